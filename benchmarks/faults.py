"""``python -m benchmarks.faults``: how many outputs races make wrong, with versions and without. A simulation.

Many requests that share prefixes run on engines whose pages go to the host's memory and come back, while
`glmjax.serving.faults` makes landings and collections late. Every output is compared with that of an engine without
faults, and is wrong where it differs, unless rounding may have decided it (`glmjax.evaluation.margins`).

It can be interrupted: every so many requests all modes have been judged, and what was found is kept, a small file a
piece. The next call goes on from there, on another machine, too, and runs modes that a piece lacks.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import tyro
from tqdm import tqdm

import glmjax
from benchmarks.fault_workload import KINDS, Asked, Workload
from benchmarks.measure import machine
from glmjax.evaluation.arguments import encode, read_or_held_out
from glmjax.evaluation.margins import margins
from glmjax.glm import GLM
from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from glmjax.serving.errors import AnomalyError, UnavailableError
from glmjax.serving.faults import FaultRates
from glmjax.serving.stream import Stream

RACES = FaultRates(late_landing=0.05, forward_before_ready=0.05, retire_during_transfer=0.05)
FLIPS = FaultRates(bit_flip=0.02)
BLIND = AnomalyRules(enabled=False)
LOOKS = AnomalyRules(least_tokens=32, window=16)
"""The published rules with a quarter of their tokens and rounds: answers here are that much shorter."""

TIE = 1e-4
"""Margin below which rounding may decide."""


MODES: dict[str, tuple[FaultRates | None, AnomalyRules]] = {
    "no faults": (None, LOOKS),
    "races, unversioned": (dataclasses.replace(RACES, versioned=False), BLIND),
    "races, unversioned, detector": (dataclasses.replace(RACES, versioned=False), LOOKS),
    "races, versioned": (RACES, LOOKS),
    "bit flips, no checksums": (dataclasses.replace(FLIPS, versioned=False), BLIND),
    "bit flips, checksums": (FLIPS, BLIND),
}
"""Faults, and whether the detector looks; everything is compared with the first."""

_COUNTED = ("suspicions", "benign", "restarts", "aborts", "replays", "dropped", "corrupt", "landed")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a request.

    Attributes:
        ids: tokens it sent.
        status: "finished", "aborted" by the detector, or "failed".
    """

    ids: tuple[int, ...]
    status: str


@dataclasses.dataclass(frozen=True)
class Tally:
    """What came of the requests of a mode.

    Attributes:
        requests: how many.
        wrong: finished with a wrong output.
        ties: outputs that differ where rounding may have decided.
        aborted: by the detector.
        aborted_wrong: of these, with a wrong output by then.
        failed: without an output.
        late: of each of `aborted_wrong`, tokens between the first wrong one and the end.
        counters: faults that were made, and what the engine did about them.
    """

    requests: int = 0
    wrong: int = 0
    ties: int = 0
    aborted: int = 0
    aborted_wrong: int = 0
    failed: int = 0
    late: tuple[int, ...] = ()
    counters: dict[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        names = [field.name for field in dataclasses.fields(self) if field.name != "counters"]
        counters = collections.Counter(self.counters)
        counters.update(other.counters)
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names}, counters=dict(counters))

    @property
    def wrong_per_10000(self) -> float:
        """Requests."""
        return 1e4 * self.wrong / self.requests


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Wrong outputs per 10,000 requests under races that are made on purpose (a simulation).

    Attributes:
        requests: in all, of each mode.
        piece: requests after which what was found is kept.
        results: the folder where it is kept, and the report in the end (report.json).
        streams: requests that run at once.
        inflight: requests that run or wait.
        documents: prefixes that requests share.
        document_tokens: of each.
        new_tokens: fewest and most of an answer.
        pages: of the cache: so few that prefixes have to leave it.
        num_draft: drafts a round, which the detector needs.
    """

    requests: int = 10_000
    piece: int = 500
    results: Path = Path(".faults")
    streams: int = 16
    inflight: int = 24
    documents: int = 40
    document_tokens: int = 128
    new_tokens: tuple[int, int] = (16, 128)
    pages: int = 96
    num_draft: int = 3

    @property
    def settings(self) -> dict[str, object]:
        """What pieces must have in common to be added up."""
        given = dataclasses.asdict(self).items()
        return json.loads(json.dumps({name: of for name, of in given if name not in ("requests", "piece", "results")}))


def engine_config(arguments: Arguments, mode: str) -> EngineConfig:
    """Of the engine of a mode."""
    faults, rules = MODES[mode]
    return EngineConfig(
        max_model_len=2 * arguments.document_tokens + arguments.new_tokens[1],
        max_num_seqs=arguments.streams,
        pages=arguments.pages,
        num_draft=arguments.num_draft,
        adapts_draft=False,
        offload_bytes=1 << 30,
        anomalies=rules,
        faults=faults,
    )


def serve(engine: Engine, asked: Sequence[Asked], inflight: int) -> tuple[list[Outcome], dict[str, int]]:
    """What comes of requests, each read as it comes; and counters."""

    async def one(request: Asked, places: asyncio.Semaphore) -> Outcome:
        async with places:
            stream: Stream = engine.generate(request.ids, request.params)
            ids: list[int] = []
            try:
                async for chunk in stream:
                    ids += chunk.ids
            except AnomalyError:
                return Outcome(tuple(ids), "aborted")
            except UnavailableError:
                return Outcome(tuple(ids), "failed")
            return Outcome(tuple(ids), "finished")

    async def every() -> list[Outcome]:
        places = asyncio.Semaphore(inflight)
        return await asyncio.gather(*(one(request, places) for request in asked))

    before = _counters(engine)
    outcomes = asyncio.run(every())
    return outcomes, dict(_counters(engine) - before)


def _counters(engine: Engine) -> collections.Counter:
    stats = engine.stats()
    return collections.Counter({name: getattr(stats, name) for name in _COUNTED} | stats.faults)


def campaign(glm: GLM, workload: Workload, arguments: Arguments, configs: Mapping[str, EngineConfig]) -> None:
    """Run what is left, in pieces: all modes of one, then a file of what was found.

    Args:
        glm: the model.
        workload: requests by number.
        arguments: how many, and where to.
        configs: of each mode's engine; the first is the one to compare with.
    """
    pieces = kept(arguments, configs)
    done = max((numbers.stop for numbers in pieces), default=0)
    for begin in range(done, arguments.requests, arguments.piece):
        pieces[range(begin, min(begin + arguments.piece, arguments.requests))] = {}
    lacking = {numbers: [mode for mode in configs if mode not in modes] for numbers, modes in pieces.items()}
    wanted = {mode for modes in lacking.values() for mode in modes}
    if not wanted:
        return
    reference = next(iter(configs))
    with contextlib.ExitStack() as opened:
        engines = {
            mode: opened.enter_context(Engine(glm, config))
            for mode, config in configs.items()
            if mode in wanted or mode == reference
        }
        total = sum(len(numbers) * len(modes) for numbers, modes in lacking.items())
        bar = opened.enter_context(tqdm(total=total, unit="request"))
        for numbers, modes in lacking.items():
            if not modes:
                continue
            asked = [workload[n] for n in numbers]
            served = {reference: serve(engines[reference], asked, arguments.inflight)}
            for mode in modes:
                bar.set_description(mode)
                outcomes, counters = served.get(mode) or serve(engines[mode], asked, arguments.inflight)
                tally = judge(glm, asked, outcomes, served[reference][0])
                pieces[numbers][mode] = dataclasses.replace(tally, counters=counters)
                bar.update(len(numbers))
            _keep(arguments, configs, numbers, pieces[numbers])


def _setting(config: EngineConfig) -> dict[str, object]:
    """What the results of a mode must have in common to be added up."""
    return {
        "faults": config.faults and dataclasses.asdict(config.faults),
        "rules": dataclasses.asdict(config.anomalies),
    }


def _keep(
    arguments: Arguments, configs: Mapping[str, EngineConfig], numbers: range, tallies: Mapping[str, Tally]
) -> None:
    modes = {mode: _setting(configs[mode]) | {"found": dataclasses.asdict(tally)} for mode, tally in tallies.items()}
    found = {
        "requests": [numbers.start, numbers.stop],
        "machine": machine(),
        "settings": arguments.settings,
        "modes": modes,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{numbers.start:06}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.rename(path)


def kept(arguments: Arguments, configs: Mapping[str, EngineConfig]) -> dict[range, dict[str, Tally]]:
    """What has been run: of each piece, the modes that it has.

    Raises:
        ValueError: with other settings.
    """
    pieces = {}
    for path in sorted(arguments.results.glob("[0-9]*.json")):
        found = json.loads(path.read_text())
        modes = {mode: of for mode, of in found["modes"].items() if mode in configs}
        then = found["settings"], {mode: {"faults": of["faults"], "rules": of["rules"]} for mode, of in modes.items()}
        now = arguments.settings, {mode: _setting(configs[mode]) for mode in modes}
        if then != now:
            raise ValueError(f"{path} was run with {then}, not with {now}; give another --results")
        tallies = {mode: Tally(**of["found"] | {"late": tuple(of["found"]["late"])}) for mode, of in modes.items()}
        pieces[range(*found["requests"])] = tallies
    return pieces


def parting(outcome: Outcome, reference: Outcome) -> int | None:
    """The first place at which tokens differ from those they should be, as far as they were sent; None for none."""
    ids, expected = outcome.ids, reference.ids
    differing = (n for n, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1])
    short = outcome.status == "finished" and len(ids) != len(expected)
    return next(differing, min(len(ids), len(expected)) if short else None)


def judge(glm: GLM, asked: list[Asked], outcomes: list[Outcome], reference: list[Outcome]) -> Tally:
    """How many outputs are wrong, and how many of those the detector found, how late."""
    wrong, ties, late = 0, 0, []
    for request, outcome, expected in zip(asked, outcomes, reference, strict=True):
        if (at := parting(outcome, expected)) is None:
            continue
        if margins(glm, request.ids, request.params, expected.ids[:at]).least < TIE:
            ties += 1
        elif outcome.status == "aborted":
            late.append(len(outcome.ids) - at)
        else:
            wrong += outcome.status == "finished"
    statuses = collections.Counter(outcome.status for outcome in outcomes)
    return Tally(len(asked), wrong, ties, statuses["aborted"], len(late), statuses["failed"], tuple(late))


def report(arguments: Arguments, configs: Mapping[str, EngineConfig]) -> dict[str, Tally]:
    """Of every mode, as far as it has been run."""
    pieces = kept(arguments, configs).values()
    return {mode: sum((modes[mode] for modes in pieces if mode in modes), Tally()) for mode in configs}


def table(found: Mapping[str, Tally]) -> str:
    """The report, to be read."""
    lines = [
        f"{'':<30}{'requests':>9}{'wrong':>7}{'per 10,000':>12}{'ties':>6}{'aborted':>9}{'of wrong':>10}{'after':>7}  counters"
    ]
    for mode, of in found.items():
        late = f"{median(of.late):.0f}" if of.late else "–"
        counters = ", ".join(f"{name} {count}" for name, count in sorted(of.counters.items()))
        lines.append(
            f"{mode:<30}{of.requests:>9,}{of.wrong:>7}{of.wrong_per_10000:>12.1f}{of.ties:>6}{of.aborted:>9}"
            f"{of.aborted_wrong:>10}{late:>7}  {counters}"
        )
    return "\n".join([*lines, "after: median of tokens between the first wrong one and the abort"])


def main(arguments: Arguments) -> None:
    """Run what is left, and report."""
    glmjax.compilation_cache()
    glm = glmjax.load()
    workload = Workload(
        glm,
        encode(glm, read_or_held_out(())),
        documents=arguments.documents,
        length=arguments.document_tokens,
        new_tokens=arguments.new_tokens,
    )
    configs = {mode: engine_config(arguments, mode) for mode in MODES}
    campaign(glm, workload, arguments, configs)
    found = report(arguments, configs)
    kinds = collections.Counter(workload[n].kind for n in range(arguments.requests))
    print("simulated faults; requests: " + ", ".join(f"{kinds[kind]:,} {kind}" for kind in KINDS))
    print(table(found))
    print(machine())
    modes = {mode: dataclasses.asdict(of) | {"wrong_per_10000": of.wrong_per_10000} for mode, of in found.items()}
    (arguments.results / "report.json").write_text(json.dumps({"modes": modes, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.faults"))
