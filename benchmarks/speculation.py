"""``python -m benchmarks.speculation``: what drafts add to one stream, by what it is asked to do.

Three engines run everything by turns: one never drafts, one always as much as it can, one as much as pays. Code is
continued after pieces of held-out files, a list goes on repeating itself, a blank is filled between two pieces of a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import tyro

import glmjax
from benchmarks.measure import machine
from glmjax.evaluation.arguments import encode, read_or_held_out
from glmjax.glm import GLM
from glmjax.model.infill import BlankTokens
from glmjax.model.sampling_params import SamplingParams
from glmjax.nano import NANO
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from glmjax.serving.stream import Statistics

TASKS = ("code", "repetition", "infill")


class Asked(NamedTuple):
    """A prompt, and what ends the answer."""

    ids: list[int]
    stops: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tokens a second of one stream without drafts, with as many as there can be, and with as many as pay.

    Attributes:
        model_path: directory of a checkpoint with an MTP layer; default the model in the box.
        files: texts to take pieces of; default held-out modules of the standard library.
        num_draft: most drafts of a round.
        prompts: of each task.
        context: tokens of a prompt.
        new_tokens: most tokens of an answer.
        temperatures: to sample at.
        repeats: turns.
    """

    model_path: Path = NANO
    files: tuple[Path, ...] = ()
    num_draft: int = 3
    prompts: int = 8
    context: int = 256
    new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)
    repeats: int = 3


def prompts_of(task: str, glm: GLM, texts: Sequence[np.ndarray], count: int, context: int) -> list[Asked]:
    """A task's prompts, always the same.

    Args:
        task: one of `TASKS`.
        glm: for its tokenizer.
        texts: token ids.
        count: how many.
        context: tokens of each, about.

    Raises:
        ValueError: no text is long enough.
    """
    long = [text for text in texts if len(text) > 2 * context]
    if not long:
        raise ValueError(f"no text has more than {2 * context} tokens, twice the context; give longer files")
    rng, found = np.random.default_rng(0), []
    for n in range(count):
        text = long[n % len(long)]
        begin = int(rng.integers(0, len(text) - 2 * context + 1))
        piece = text[begin : begin + 2 * context].tolist()
        if task == "code":
            found.append(Asked(piece[:context]))
        elif task == "repetition":
            line = piece[: int(rng.integers(8, 24))]
            found.append(Asked((line * context)[:context]))
        else:
            blanks = BlankTokens.of(glm.tokenizer)
            before, hidden = context // 2, context // 4
            ids = blanks.prompt(piece[:before], piece[before + hidden : context + hidden])
            found.append(Asked(ids, (blanks.eop,)))
    return found


def speed(engine: Engine, asked: Sequence[Asked], temperature: float, new_tokens: int) -> tuple[float, float, float]:
    """Of answers one after another: tokens a second after each first one, tokens and drafts a round."""
    told: list[Statistics] = []
    for seed, one in enumerate(asked):
        params = SamplingParams(
            temperature=temperature, seed=seed, max_new_tokens=new_tokens, stop_token_ids=one.stops, ignore_eos=True
        )
        [result] = engine.generate(one.ids, params).finish()
        told.append(result.statistics)
    tokens = sum(one.new_tokens - 1 for one in told)
    seconds = sum(one.seconds - one.first_token_seconds for one in told)
    rounds = max(1, sum(one.rounds for one in told))
    return tokens / seconds, 1 + sum(one.accepted for one in told) / rounds, sum(one.drafted for one in told) / rounds


def run(glm: GLM, texts: Sequence[np.ndarray], arguments: Arguments) -> str:
    """Measure; the table."""
    config = EngineConfig(max_model_len=arguments.context + arguments.new_tokens + 64, max_num_seqs=1)
    most = arguments.num_draft
    configs = {
        "none": config,
        f"{most}": dataclasses.replace(config, num_draft=most, adapts_draft=False),
        "adapting": dataclasses.replace(config, num_draft=most),
    }
    lines = [
        f"{'':>12}{'':>13}{'none':>10}{f'{most} drafts':>26}{'adapting':>36}",
        f"{'task':>12}{'temperature':>13}{'tokens/s':>10}{'tokens/s':>10}{'gain':>8}{'a round':>8}"
        f"{'tokens/s':>10}{'gain':>8}{'a round':>8}{'drafts':>10}",
    ]
    with contextlib.ExitStack() as opened:
        engines = {name: opened.enter_context(Engine(glm, config, progress=True)) for name, config in configs.items()}
        for task in TASKS:
            asked = prompts_of(task, glm, texts, arguments.prompts, arguments.context)
            for temperature in arguments.temperatures:
                turns = [
                    {name: speed(engine, asked, temperature, arguments.new_tokens) for name, engine in engines.items()}
                    for _ in range(1 + arguments.repeats)
                ][1:]  # the first warms up: prefixes, and what the engine knows of its rounds
                none, fixed, adapting = (
                    [median(turn[name][n] for turn in turns) for n in range(3)] for name in configs
                )
                gains = [median(turn[name][0] / turn["none"][0] for turn in turns) for name in configs]
                lines.append(
                    f"{task:>12}{temperature:>13}{none[0]:>10.0f}{fixed[0]:>10.0f}{gains[1]:>7.2f}×{fixed[1]:>8.2f}"
                    f"{adapting[0]:>10.0f}{gains[2]:>7.2f}×{adapting[1]:>8.2f}{adapting[2]:>10.2f}"
                )
    lines.append(f"gain: over no drafts within a turn, medians of {arguments.repeats} turns; a round: tokens of it")
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    """Measure and print."""
    glmjax.compilation_cache()
    glm = glmjax.load(arguments.model_path)
    print(run(glm, encode(glm, read_or_held_out(arguments.files)), arguments))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.speculation"))
