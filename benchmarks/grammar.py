"""``python -m benchmarks.grammar``: what a neighbour that writes JSON by a schema costs the others.

The same streams decode beside one more: an ordinary one, and one under a JSON schema. Both kinds are run by turns in one
process, and the ratio is the median of those within a turn. Prompts are read once before.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

import glmjax
from benchmarks.measure import machine
from glmjax.glm import GLM
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "country": {"enum": ["France", "Japan", "Peru"]},
            "population": {"type": "integer", "minimum": 0},
            "capital": {"type": "boolean"},
        },
        "required": ["name", "country", "population", "capital"],
        "additionalProperties": False,
    },
    "minItems": 1000,
}
"""A list that never ends."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Decoding speed of several streams beside an ordinary neighbour, and beside one under a JSON schema.

    Attributes:
        model_path: directory of a checkpoint; default the model in the box.
        context: tokens of each prompt.
        new_tokens: tokens that each of the others generates.
        streams: how many others.
        repeats: turns.
        num_draft: drafts a round.
        max_model_len: most tokens of a sequence; the fewer, the fewer programs are compiled.
    """

    model_path: Path | None = None
    context: int = 128
    new_tokens: int = 256
    streams: int = 7
    repeats: int = 7
    num_draft: int = 0
    max_model_len: int = 512


def run(glm: GLM, arguments: Arguments) -> str:
    """Measure; the table."""
    rng = np.random.default_rng(0)
    count = arguments.streams + 1
    prompts = [rng.integers(0, glm.config.vocab_size - 100, arguments.context).tolist() for _ in range(count)]
    asked = {"temperature": 0, "ignore_eos": True, "max_new_tokens": arguments.new_tokens}
    endless = asked | {"max_new_tokens": arguments.max_model_len - arguments.context}
    config = EngineConfig(
        max_model_len=arguments.max_model_len, max_num_seqs=count, num_draft=arguments.num_draft, grammars=True
    )
    neighbours: dict[str, dict[str, Any]] = {"ordinary": endless, "JSON schema": endless | {"json_schema": SCHEMA}}

    with Engine(glm, config, progress=True) as engine:

        def beside(fields: dict[str, Any]) -> tuple[float, float]:
            """Tokens a second of the others and of the neighbour, while all run."""
            neighbour = engine.generate(prompts[0], **fields)
            next(neighbour)
            streams = [engine.generate(prompt, **asked) for prompt in prompts[1:]]
            [next(stream) for stream in streams]
            began = time.perf_counter()
            left = sum(len(chunk.ids) for stream in streams for chunk in stream)
            seconds = time.perf_counter() - began
            neighbour.cancel()
            written = [(chunk.ids, chunk.statistics) for chunk in neighbour]
            statistics = written[-1][1]
            return left / seconds, statistics.new_tokens / statistics.seconds

        for prompt in prompts:
            engine.generate(prompt, **asked | {"max_new_tokens": 1}).finish()
        found = [{name: beside(fields) for name, fields in neighbours.items()} for _ in range(arguments.repeats)]
    lines = [f"{'neighbour':>12}{'others tokens/s':>17}{'of beside ordinary':>20}{'its own tokens/s':>18}"]
    for name in neighbours:
        others, own = (median(turn[name][i] for turn in found) for i in (0, 1))
        share = median(turn[name][0] / turn["ordinary"][0] for turn in found)
        lines.append(f"{name:>12}{others:>17.1f}{share:>20.3f}{own:>18.1f}")
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    """Measure and print."""
    glm = glmjax.load(arguments.model_path) if arguments.model_path else glmjax.load()
    print(run(glm, arguments))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.grammar"))
