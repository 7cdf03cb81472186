"""``python -m benchmarks.generate``: how fast a model reads a prompt and generates, beside what the memory could give.

Decoding one sequence is bound by reading the weights. The last columns say how many bytes of them a token needs and how
fast they were read; the reference is the fastest of NumPy's and JAX's sum over a large array, in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import glmjax
from glmjax.glm import GLM
from glmjax.model.assemble import named_weights
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


def bytes_per_token(glm: GLM) -> int:
    """Bytes of weights that decoding one token reads.

    Of the routed experts those chosen, of the embedding one row, of the MTP layer (the last entry of its stacks) nothing.
    """
    config, total = glm.config, 0.0
    mtp = glm.weights.mtp is not None
    for name, weight in named_weights(glm.weights).items():
        size = sum(array.nbytes for array in (weight.array, weight.scales) if array is not None)
        if name.startswith("mtp."):
            continue
        if name == "embed_VD" and not config.tie_word_embeddings:
            size /= config.vocab_size
        if mtp and weight.letters.startswith("L") and not name.startswith("dense_"):
            size *= 1 - 1 / weight.array.shape[0]
        if name in ("experts.gate_up_LE2FD", "experts.down_LEDF"):
            size *= config.num_experts_per_tok / config.n_routed_experts
        total += size
    return round(total)


def read_bandwidths(mib: int) -> Any:
    """A function that measures NumPy's and JAX's bytes per second over a sum of `mib` MiB, warmed up."""
    host = np.ones(mib * 2**18, np.float32)
    device = jnp.ones(mib * 2**18, jnp.float32)
    total = jax.jit(jnp.sum)

    def measure() -> float:
        found = []
        for add, array in ((np.sum, host), (total, device)):
            began = time.perf_counter()
            float(add(array))
            found.append(array.nbytes / (time.perf_counter() - began))
        return max(found)

    measure()
    return measure


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
    weights, bandwidth = bytes_per_token(glm), median(bandwidths)
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


def machine() -> str:
    """What the numbers depend on."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = ", ".join(f"{name} {version(name)}" for name in ("glmjax", "jax", "jaxlib", "flax", "numpy"))
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{device.device_kind} ({cpu}, {os.cpu_count()} cores{load}); Python {platform.python_version()}, {versions}"


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
