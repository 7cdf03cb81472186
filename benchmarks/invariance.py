"""``python -m benchmarks.invariance``: output does not depend on how it is served.

The reference is each request alone, by `generate`. The same requests then go through engines: in random order, arriving
while others run; with other chunk sizes; with and without cached prefixes; preempted; suspected and read again; with
drafts. Programs of different shapes differ in the last bits, so a token may differ where something was as good as tied: at
most once in 10,000 tokens, and nowhere by 1e-4 or more. Every difference is printed; exit status 1 if there are others.

Replays after faults are not here, for nothing but a fault causes them: tests/serving/test_races.py has them.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

import glmjax
from benchmarks.measure import machine
from glmjax.evaluation.arguments import encode, read_or_held_out
from glmjax.evaluation.drafts import pieces
from glmjax.evaluation.loops import loop_start
from glmjax.evaluation.margins import Margins, margins
from glmjax.glm import GLM
from glmjax.model.sampling_params import SamplingParams
from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from glmjax.serving.stats import EngineStats

TOLERANCE = 1e-4
"""A difference is rounding where something was closer than that …"""
TOKENS_PER_DIFFERENCE = 10_000
"""… and so many tokens may have one."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare what engines give, token by token, with what `generate` gives for each request alone.

    Attributes:
        model_path: directory of a checkpoint; default the model in the box.
        prompts: how many requests.
        new_tokens: of each.
        files: texts to take prompts from; default modules of the standard library that the model in the box never saw.
        settings: which of them; default all.
        max_model_len: most tokens of a sequence; the fewer, the fewer programs are compiled.
        seed: of the order and the times of arrival.
    """

    model_path: Path | None = None
    prompts: int = 64
    new_tokens: int = 256
    files: tuple[Path, ...] = ()
    settings: tuple[str, ...] = ()
    max_model_len: int = 1024
    seed: int = 0


class Case(NamedTuple):
    """A request.

    Attributes:
        prompt: its tokens.
        params: how it is sampled.
    """

    prompt: list[int]
    params: SamplingParams


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to serve requests.

    Attributes:
        name: for the table.
        engine: which; settings of one name share it, and what it has cached.
        use_cache: whether requests use cached prefixes and leave some.
        happens: counters of `EngineStats` that must have grown, or it was not what it says.
    """

    name: str
    engine: EngineConfig
    use_cache: bool = True
    happens: tuple[str, ...] = ()


def settings(max_model_len: int, *, page: int = 64, chunk: int = 512, streams: int = 16) -> list[Setting]:
    """All of them, on six engines.

    Args:
        max_model_len: of the engines.
        page: rows of a page.
        chunk: most prompt tokens of a dispatch.
        streams: requests that run at once.
    """
    whole = -(-max_model_len // page)
    plain = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=streams,
        page_size=page,
        pages=4 * whole * streams,
        chunk_tokens=chunk,
    )

    def other(**fields: Any) -> EngineConfig:
        return dataclasses.replace(plain, **fields)

    few = other(pages=whole + whole // 2, chunk_tokens=2 * page)
    always = AnomalyRules(shortest_length=3.0, largest_rate=0.0, least_tokens=0, window=24)
    drafted = ("accepted",)
    return [
        Setting("batched, cache not used", plain, use_cache=False),
        Setting("batched, cache empty", plain),
        Setting("batched, cache hit", plain, happens=("cached_tokens",)),
        Setting("preempted, short chunks", few, happens=("preemptions",)),
        Setting("1 draft", other(num_draft=1, adapts_draft=False), happens=drafted),
        Setting("2 drafts, shortest chunks", other(num_draft=2, chunk_tokens=page), happens=drafted),
        Setting("2 drafts, suspected", other(num_draft=2, adapts_draft=False, anomalies=always), happens=("benign",)),
        Setting("4, 2, 1 and no drafts", other(num_draft=4), happens=drafted),
    ]


def lengths(count: int, most: int, *, page: int, chunk: int, topk: int) -> list[int]:
    """Of prompts: those around the boundaries of pages, chunks and the selection, mixed; every one of them twice.

    Args:
        count: how many.
        most: tokens of the longest.
        page: rows of a page.
        chunk: tokens of a chunk.
        topk: rows that a token may select.
    """
    edges = [page, 2 * page, topk, chunk, topk + page, chunk + page]
    around = [1, *(edge + side for edge in edges for side in (-1, 0, 1)), topk // 2, most]
    fitting = np.random.default_rng(0).permutation(sorted({min(length, most) for length in around if length > 0}))
    return [int(fitting[n // 2 % len(fitting)]) for n in range(count)]


def cases(texts: Sequence[np.ndarray], wanted: Sequence[int], new_tokens: int) -> list[Case]:
    """Requests with prompts of these lengths, pieces of texts; every other one greedy, with penalties against loops.

    Args:
        texts: token ids.
        wanted: lengths.
        new_tokens: of each.

    Raises:
        ValueError: no text is longer than the longest.
    """
    found = pieces(texts, max(wanted), len(wanted))
    if not found:
        raise ValueError(f"no text has more than {max(wanted)} tokens; give longer ones, or a smaller --max-model-len")
    shared = {"max_new_tokens": new_tokens, "ignore_eos": True, "presence_penalty": 0.3}
    greedy = SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.6, **shared)
    sampled = SamplingParams(
        temperature=0.9, top_p=0.95, repetition_penalty=1.05, frequency_penalty=0.1, seed=0, **shared
    )
    return [
        Case(
            found[n % len(found)][:length].tolist(),
            greedy if n % 2 else dataclasses.replace(sampled, seed=n),
        )
        for n, length in enumerate(wanted)
    ]


def alone(glm: GLM, case: Case) -> list[int]:
    """What `generate` gives."""
    return glm.generate(case.prompt, case.params).finish().ids


def served(
    engine: Engine, requests: Sequence[Case], rng: np.random.Generator, *, use_cache: bool = True
) -> list[list[int]]:
    """What an engine gives to requests in random order, each of which comes once others have had some chunks or none.

    Args:
        engine: which.
        requests: what is asked.
        rng: of the order and the arrival.
        use_cache: whether they use cached prefixes and leave some.

    Returns:
        New tokens of each, in the order of the arguments.
    """
    ids: list[list[int]] = [[] for _ in requests]
    streams: dict[int, Any] = {}
    for n in rng.permutation(len(requests)).tolist():
        streams[n] = engine.generate(requests[n].prompt, requests[n].params, use_cache=use_cache)
        for other in rng.choice(list(streams), size=rng.integers(0, 3)).tolist():
            ids[other] += chunk.ids if (chunk := next(streams[other], None)) else ()
    for n, stream in streams.items():
        ids[n] += (token for chunk in stream for token in chunk.ids)
    return ids


class Difference(NamedTuple):
    """Where a sequence leaves its reference.

    Attributes:
        request: which.
        prompt_tokens: of it.
        position: of the first other token, among the new ones.
        expected: the reference's token; −1 where it has ended.
        found: the token in its place; −1 where the sequence has ended.
        margins: of the reference's.
    """

    request: int
    prompt_tokens: int
    position: int
    expected: int
    found: int
    margins: Margins

    @property
    def excused(self) -> bool:
        """Whether it can be rounding."""
        return self.margins.least < TOLERANCE

    def __str__(self) -> str:
        of = self.margins
        return (
            f"request {self.request} of {self.prompt_tokens} tokens, new token {self.position}: "
            f"{self.found} instead of {self.expected}; margins: token {of.token:.2g}, selection {of.selection:.2g}, "
            f"router {of.router:.2g} (before: {of.earlier:.2g} at {of.earlier_position})"
            + ("" if self.excused else "  NOT ROUNDING")
        )


class Compared(NamedTuple):
    """Sequences beside their references.

    Attributes:
        tokens: that were compared: of each sequence up to its first difference.
        differences: the first of every sequence that has one.
    """

    tokens: int
    differences: tuple[Difference, ...]

    @property
    def holds(self) -> bool:
        """Whether output is the same but for rounding, and that is rare."""
        allowed = -(-self.tokens // TOKENS_PER_DIFFERENCE)
        return len(self.differences) <= allowed and all(of.excused for of in self.differences)


def compare(
    glm: GLM, requests: Sequence[Case], expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> Compared:
    """Sequences beside their references.

    Args:
        glm: the model, which tells how near a token was to being another.
        requests: what was asked.
        expected: new tokens of the references.
        found: new tokens.
    """
    tokens, differences = 0, []
    for n, (case, reference, ids) in enumerate(zip(requests, expected, found, strict=True)):
        pairs = zip([*reference, -1], [*ids, -1], strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        tokens += len(reference) if position is None else position + 1
        if position is not None:
            a, b = ([*side, -1][position] for side in (reference, ids))
            near = margins(glm, case.prompt, case.params, reference[:position])
            differences.append(Difference(n, len(case.prompt), position, a, b, near))
    return Compared(tokens, tuple(differences))


def run(glm: GLM, arguments: Arguments) -> bool:
    """Serve, compare and print; whether output is the same in every setting.

    Raises:
        ValueError: a setting has no such name, or prompts leave no room.
    """
    chosen = settings(arguments.max_model_len)
    if unknown := set(arguments.settings).difference(setting.name for setting in chosen):
        raise ValueError(f"no setting {sorted(unknown)}; there are {[setting.name for setting in chosen]}")
    chosen = [setting for setting in chosen if not arguments.settings or setting.name in arguments.settings]
    most = arguments.max_model_len - arguments.new_tokens
    if most < 1:
        raise ValueError(
            f"{arguments.new_tokens} new tokens leave no room in --max-model-len {arguments.max_model_len}"
        )
    plain = chosen[0].engine
    wanted = lengths(
        arguments.prompts, most, page=plain.page_size, chunk=EngineConfig.chunk_tokens, topk=glm.config.index_topk
    )
    requests = cases(encode(glm, read_or_held_out(arguments.files)), wanted, arguments.new_tokens)
    began = time.perf_counter()
    expected = [alone(glm, case) for case in requests]
    looping = sum(loop_start(ids) is not None for ids in expected)
    print(
        f"{len(requests)} prompts of {min(wanted)} to {max(wanted)} tokens, {arguments.new_tokens} new tokens of each; "
        f"{looping} loop; alone in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    rng, total, holds = np.random.default_rng(arguments.seed), Compared(0, ()), True
    for config in dict.fromkeys(setting.engine for setting in chosen):
        with Engine(glm, config, progress=sys.stderr.isatty()) as engine:
            for setting in (setting for setting in chosen if setting.engine == config):
                began, before = time.perf_counter(), engine.stats()
                found = served(engine, requests, rng, use_cache=setting.use_cache)
                of = compare(glm, requests, expected, found)
                holds &= _told(setting, of, before, engine.stats(), time.perf_counter() - began)
                total = Compared(total.tokens + of.tokens, total.differences + of.differences)
        # Compiled programs are mapped in many pieces each, and XLA crashes where a process has more than 65,530.
        del engine
        jax.clear_caches()
        gc.collect()
    far = sum(not difference.excused for difference in total.differences)
    print(f"{total.tokens:,} tokens, {len(total.differences)} differences, {far} of them not rounding")
    return holds and total.holds


def _told(setting: Setting, of: Compared, before: EngineStats, after: EngineStats, seconds: float) -> bool:
    """Print what a setting gave; whether it was what it says."""
    grown = {
        name: getattr(after, name) - getattr(before, name)
        for name in ("cached_tokens", "preemptions", "replays", "drafted", "accepted", "suspicions", "benign", "aborts")
    }
    far = sum(not difference.excused for difference in of.differences)
    told = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in grown.items() if count)
    print(
        f"{setting.name}: {of.tokens:,} tokens, {len(of.differences)} differences, {far} of them not rounding "
        f"({told or 'nothing else'}; {seconds:.0f} s)"
    )
    for difference in of.differences:
        print(f"  {difference}")
    missing = [name for name in setting.happens if not grown[name]]
    if missing:
        print(f"  there were no {missing}: this is not the setting it should be; give more --prompts")
    sys.stdout.flush()
    return not missing


def main(arguments: Arguments) -> int:
    """Compare and print; the exit status."""
    glm = glmjax.load(arguments.model_path) if arguments.model_path else glmjax.load()
    same = run(glm, arguments)
    print(machine())
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="python -m benchmarks.invariance")))
