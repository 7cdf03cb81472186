"""``python -m benchmarks.generate``: how fast a model reads a prompt and generates, beside what the memory could give.

Decoding one sequence is bound by reading the weights. The last columns say how many bytes of them a token needs and how
fast they were read; the reference is the fastest of NumPy's and JAX's sum over a large array, in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from statistics import median

import jax.numpy as jnp
import numpy as np
import tyro

import glmjax
from benchmarks.measure import machine, read_bandwidths, weight_bytes
from glmjax.glm import GLM
from glmjax.model.checkpoint import LoadFormat

CONFIGURATION = Path(__file__).parents[1] / "configs" / "nano.json"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time to first token, prefill and decoding speed, read bandwidth.

    Attributes:
        model_path: directory of a checkpoint; default random weights of the size of the model in the box.
        load_format: where weights come from; "dummy" needs a config.json only.
        dtype: of weights and activations; default as for `glmjax.load`.
        prompts: prompt lengths in tokens.
        new_tokens: tokens to generate after each.
        repeats: runs of each, interleaved; medians are printed.
        read_mib: size of the array whose sum measures the read bandwidth.
    """

    model_path: Path | None = None
    load_format: LoadFormat = "auto"
    dtype: str | None = None
    prompts: tuple[int, ...] = (64, 512, 2048)
    new_tokens: int = 48
    repeats: int = 5
    read_mib: int = 256


def run(glm: GLM, arguments: Arguments) -> str:
    """Measure; the table."""
    rng = np.random.default_rng(0)
    vocabulary = glm.tokenizer.vocab_size if glm.tokenizer else glm.config.vocab_size
    prompts = [rng.integers(0, vocabulary, length) for length in arguments.prompts]
    read = read_bandwidths(arguments.read_mib)

    def once(prompt: np.ndarray) -> glmjax.Statistics:
        new_tokens = arguments.new_tokens
        return glm.generate(prompt, temperature=0, max_new_tokens=new_tokens, ignore_eos=True).finish().statistics

    cold = [once(prompt).first_token_seconds for prompt in prompts]
    found: list[list[glmjax.Statistics]] = [[] for _ in prompts]
    bandwidths = []
    for _ in range(arguments.repeats):
        bandwidths.append(read())
        for prompt, statistics in zip(prompts, found, strict=True):
            statistics.append(once(prompt))
    weights, bandwidth = weight_bytes(glm.weights), median(bandwidths)
    lines = [
        f"{'prompt':>8}{'first token':>13}{'compiling':>11}{'prefill':>11}{'decode':>11}{'weights':>10}{'read':>10}"
        f"{'of memory':>11}",
        f"{'tokens':>8}{'s':>13}{'s, once':>11}{'tokens/s':>11}{'tokens/s':>11}{'MB/token':>10}{'GB/s':>10}{'%':>11}",
    ]
    for length, first_cold, statistics in zip(arguments.prompts, cold, found, strict=True):
        first = median(s.first_token_seconds for s in statistics)
        speed = median(s.tokens_per_second for s in statistics)
        lines.append(
            f"{length:>8,}{first:>13.4f}{max(first_cold - first, 0):>11.1f}{length / first:>11,.0f}{speed:>11.1f}"
            f"{weights / 1e6:>10.2f}{weights * speed / 1e9:>10.2f}{100 * weights * speed / bandwidth:>11.1f}"
        )
    lines.append(f"memory reads {bandwidth / 1e9:.2f} GB/s; medians of {arguments.repeats} interleaved runs")
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory:
        path, load_format = arguments.model_path, arguments.load_format
        if path is None:
            path, load_format = Path(directory), "dummy"
            (path / "config.json").write_text(json.dumps(json.loads(CONFIGURATION.read_text())))
        glm = glmjax.load(path, load_format=load_format, dtype=arguments.dtype)
    name = arguments.model_path or f"{CONFIGURATION.name} with random weights"
    print(f"{name}, {jnp.dtype(glm.weights.dtype).name}, {arguments.new_tokens} new tokens, one sequence")
    print(run(glm, arguments))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.generate"))
