"""``python -m benchmarks.faults``: how many outputs races make wrong, with versions and without. A simulation.

Many requests that share prefixes run on an engine whose pages go to the host's memory and come back, while
`glmjax.serving.faults` makes landings and collections late. Every output is compared with that of an engine without
faults, and is wrong where it differs, unless rounding may have decided it (`glmjax.evaluation.margins`).

It can be interrupted: what has been run is kept, and the next call goes on from there.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
from pathlib import Path
from statistics import median

import tyro
from tqdm import tqdm

import glmjax
from benchmarks.fault_workload import KINDS, Workload
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
TIE = 1e-4
"""Margin below which rounding may decide."""

MODES: dict[str, tuple[FaultRates | None, AnomalyRules]] = {
    "no faults": (None, AnomalyRules()),
    "races, unversioned": (dataclasses.replace(RACES, versioned=False), BLIND),
    "races, unversioned, detector": (dataclasses.replace(RACES, versioned=False), AnomalyRules()),
    "races, versioned": (RACES, AnomalyRules()),
    "bit flips, no checksums": (dataclasses.replace(FLIPS, versioned=False), BLIND),
    "bit flips, checksums": (FLIPS, AnomalyRules()),
}
"""Faults, and whether the detector looks; everything is compared with the first."""


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
class Arguments:
    """Wrong outputs per 10,000 requests under races that are made on purpose (a simulation).

    Attributes:
        requests: in all, of each mode.
        piece: requests after which what has been run is kept.
        results: where it is kept, and the report in the end (report.json).
        modes: which to run; the others are reported as far as they have been run before.
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
    modes: tuple[str, ...] = tuple(MODES)
    streams: int = 16
    inflight: int = 24
    documents: int = 40
    document_tokens: int = 128
    new_tokens: tuple[int, int] = (16, 128)
    pages: int = 96
    num_draft: int = 3


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


def serve(engine: Engine, workload: Workload, numbers: range, inflight: int) -> list[Outcome]:
    """What comes of requests, each read as it comes."""

    async def one(n: int, places: asyncio.Semaphore) -> Outcome:
        async with places:
            asked = workload[n]
            stream: Stream = engine.generate(asked.ids, asked.params)
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
        return await asyncio.gather(*(one(n, places) for n in numbers))

    return asyncio.run(every())


def campaign(glm: GLM, workload: Workload, arguments: Arguments, mode: str, config: EngineConfig) -> None:
    """Run what is left of a mode, piece by piece, each into a file of its own."""
    folder = _folder(arguments, mode)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes, _ = kept(arguments, mode)
    left = [
        range(n, min(n + arguments.piece, arguments.requests))
        for n in range(len(outcomes), arguments.requests, arguments.piece)
    ]
    if not left:
        return
    with Engine(glm, config, progress=True) as engine:
        before = collections.Counter()
        for numbers in tqdm(left, mode):
            outcomes = serve(engine, workload, numbers, arguments.inflight)
            stats = engine.stats()
            names = ("suspicions", "benign", "restarts", "aborts", "replays", "dropped", "corrupt", "landed")
            now = collections.Counter({name: getattr(stats, name) for name in names} | stats.faults)
            found = {
                "requests": [numbers.start, numbers.stop],
                "counters": dict(now - before),
                "outcomes": [[outcome.status, outcome.ids] for outcome in outcomes],
            }
            before = now
            (folder / f"{numbers.start}.json.part").write_text(json.dumps(found))
            (folder / f"{numbers.start}.json.part").rename(folder / f"{numbers.start}.json")


def _folder(arguments: Arguments, mode: str) -> Path:
    return arguments.results / mode.replace(", ", "-").replace(" ", "_")


def kept(arguments: Arguments, mode: str) -> tuple[dict[int, Outcome], collections.Counter]:
    """What has been run of a mode: outcomes by number, and counters."""
    outcomes: dict[int, Outcome] = {}
    counters: collections.Counter = collections.Counter()
    for path in _folder(arguments, mode).glob("*.json"):
        found = json.loads(path.read_text())
        counters.update(found["counters"])
        for n, (status, ids) in zip(range(*found["requests"]), found["outcomes"], strict=True):
            outcomes[n] = Outcome(tuple(ids), status)
    return outcomes, counters


def parting(outcome: Outcome, reference: Outcome) -> int | None:
    """The first place at which tokens differ from those they should be, as far as they were sent; None for none."""
    ids, expected = outcome.ids, reference.ids
    differing = (n for n, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1])
    short = outcome.status == "finished" and len(ids) != len(expected)
    return next(differing, min(len(ids), len(expected)) if short else None)


def judge(
    glm: GLM, workload: Workload, outcomes: dict[int, Outcome], reference: dict[int, Outcome]
) -> dict[str, object]:
    """How many outputs are wrong, and how many of those the detector found, how late."""
    wrong, ties, found, late = 0, 0, 0, []
    for n, outcome in outcomes.items():
        if n not in reference or (at := parting(outcome, reference[n])) is None:
            continue
        asked = workload[n]
        if margins(glm, asked.ids, asked.params, reference[n].ids[:at]).least < TIE:
            ties += 1
        elif outcome.status == "aborted":
            found += 1
            late.append(len(outcome.ids) - at)
        else:
            wrong += outcome.status == "finished"
    compared = len(outcomes.keys() & reference.keys())
    statuses = collections.Counter(outcome.status for outcome in outcomes.values())
    return {
        "requests": compared,
        "wrong": wrong,
        "wrong_per_10000": round(1e4 * wrong / compared, 1) if compared else None,
        "ties": ties,
        "aborted": statuses["aborted"],
        "aborted_wrong": found,
        "failed": statuses["failed"],
        "tokens_until_abort": median(late) if late else None,
    }


def report(glm: GLM, workload: Workload, arguments: Arguments) -> dict[str, dict[str, object]]:
    """Of every mode that has been run."""
    reference, _ = kept(arguments, "no faults")
    found = {}
    for mode in MODES:
        outcomes, counters = kept(arguments, mode)
        if outcomes:
            found[mode] = judge(glm, workload, outcomes, reference) | {"counters": dict(sorted(counters.items()))}
    return found


def table(found: dict[str, dict[str, object]]) -> str:
    """The report, to be read."""
    lines = [
        f"{'':<30}{'requests':>9}{'wrong':>7}{'per 10,000':>12}{'ties':>6}{'aborted':>9}{'of wrong':>10}  counters"
    ]
    for mode, of in found.items():
        numbers = f"{of['requests']:>9,}{of['wrong']:>7}{of['wrong_per_10000'] or 0:>12}{of['ties']:>6}"
        counters = ", ".join(f"{name} {count}" for name, count in of["counters"].items())
        lines.append(f"{mode:<30}{numbers}{of['aborted']:>9}{of['aborted_wrong']:>10}  {counters}")
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    """Run what is left, and report."""
    glm = glmjax.load()
    texts = encode(glm, read_or_held_out(()))
    workload = Workload(
        glm,
        texts,
        documents=arguments.documents,
        length=arguments.document_tokens,
        new_tokens=arguments.new_tokens,
    )
    for mode in arguments.modes:
        campaign(glm, workload, arguments, mode, engine_config(arguments, mode))
    found = report(glm, workload, arguments)
    kinds = collections.Counter(workload[n].kind for n in range(arguments.requests))
    print("simulated faults; requests: " + ", ".join(f"{kinds[kind]:,} {kind}" for kind in KINDS))
    print(table(found))
    print(machine())
    (arguments.results / "report.json").write_text(json.dumps({"modes": found, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.faults"))
