"""``python -m benchmarks.serving``: what serving many at once gives, and what it costs the one who is alone.

Prompts are read once before, so that what is measured is decoding: their pages are in the prefix tree. Everything is run
by turns in one process, and ratios are medians of those within a turn.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import median

import jax.numpy as jnp
import numpy as np
import tyro

import glmjax
from benchmarks.measure import machine
from benchmarks.synthetic import random_model
from glmjax.glm import GLM
from glmjax.model.config import GlmConfig
from glmjax.model.stops import Stops
from glmjax.nano import NANO
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Decoding speed of the engine: one stream beside `generate`, and several streams.

    Attributes:
        model_path: directory of a checkpoint; default the model in the box.
        config: a config.json, whose model gets random weights in float32: instead of a checkpoint.
        context: tokens of each prompt.
        new_tokens: tokens to generate after each.
        streams: how many at once.
        repeats: turns.
        num_draft: drafts a round.
        page_size: rows of a page.
        max_model_len: most tokens of a sequence; the fewer, the fewer programs are compiled.
    """

    model_path: Path = NANO
    config: Path | None = None
    context: int = 512
    new_tokens: int = 128
    streams: tuple[int, ...] = (1, 4, 16)
    repeats: int = 5
    num_draft: int = 0
    page_size: int = 64
    max_model_len: int = 1024


def run(glm: GLM, arguments: Arguments) -> str:
    """Measure; the table."""
    rng = np.random.default_rng(0)
    most = max(arguments.streams)
    prompts = [rng.integers(0, glm.config.vocab_size - 100, arguments.context).tolist() for _ in range(most)]
    asked = {"temperature": 0, "ignore_eos": True, "max_new_tokens": arguments.new_tokens}
    config = EngineConfig(
        max_model_len=arguments.max_model_len,
        max_num_seqs=most,
        page_size=arguments.page_size,
        pages=most * -(-arguments.max_model_len // arguments.page_size),
        num_draft=arguments.num_draft,
    )

    def alone() -> float:
        """Tokens a second of `generate`."""
        return glm.generate(prompts[0], **asked).finish().statistics.tokens_per_second

    with Engine(glm, config, progress=True) as engine:

        def together(count: int) -> float:
            """Tokens a second of all streams, from the first token of the last to begin to the last token of all."""
            streams = [engine.generate(prompt, **asked) for prompt in prompts[:count]]
            [next(stream) for stream in streams]
            began = time.perf_counter()
            left = sum(len(chunk.ids) for stream in streams for chunk in stream)
            return left / (time.perf_counter() - began)

        for prompt in prompts:
            engine.generate(prompt, **asked | {"max_new_tokens": 1}).finish()
        alone()
        found: list[dict[str, float]] = []
        for _ in range(arguments.repeats):
            found.append({"generate": alone()} | {f"{count} streams": together(count) for count in arguments.streams})
        stats = engine.stats()
    lines = [f"{'':>12}{'tokens/s':>10}{'of generate':>13}{'of one stream':>15}"]
    for name in found[0]:
        speed, *ratios = (
            median(turn[name] / (turn[of] if of else 1) for turn in found) for of in (None, "generate", "1 streams")
        )
        lines.append(f"{name:>12}{speed:>10.1f}{ratios[0]:>13.2f}{ratios[1]:>15.2f}")
    lines.append(f"host time of device time {stats.host_seconds / max(stats.device_seconds, 1e-9):.1%}")
    return "\n".join(lines)


def loaded(arguments: Arguments) -> GLM:
    """The model to serve."""
    if arguments.config is None:
        return glmjax.load(arguments.model_path)
    weights = random_model(GlmConfig.from_dir(arguments.config), jnp.float32)
    return GLM(weights, tokenizer=None, chat_template=None, stops=Stops(frozenset()))


def main(arguments: Arguments) -> None:
    """Measure and print."""
    glmjax.compilation_cache()
    print(run(loaded(arguments), arguments))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.serving"))
