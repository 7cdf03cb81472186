"""What `benchmarks.agents` found, and its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np


@dataclasses.dataclass(frozen=True)
class Call:
    """How a call went.

    Attributes:
        prompt_tokens: of its prompt.
        cached_tokens: of these, found in the prefix tree.
        first_seconds: until the client had its first token.
        first_cpu: seconds that the whole process had of the cores until then, the other sessions' calls included.
        ids: the reply.
    """

    prompt_tokens: int
    cached_tokens: int
    first_seconds: float
    first_cpu: float
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One run of tasks.

    Attributes:
        tasks: the calls of each.
        seconds: that it took.
        cpu_seconds: that the whole process had of the cores meanwhile.
    """

    tasks: list[list[Call]]
    seconds: float
    cpu_seconds: float

    @property
    def calls(self) -> list[Call]:
        """Of all tasks."""
        return [call for task in self.tasks for call in task]

    @property
    def hit_rate(self) -> float:
        """Of prompt tokens, how many were found in the prefix tree."""
        return sum(call.cached_tokens for call in self.calls) / sum(call.prompt_tokens for call in self.calls)

    @property
    def tasks_per_hour(self) -> float:
        """At the same time and in turn."""
        return 3600 * len(self.tasks) / self.seconds

    @property
    def cpu_per_task(self) -> float:
        """Seconds."""
        return self.cpu_seconds / len(self.tasks)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same tasks run twice.

    Attributes:
        cached: with the prefix cache.
        fresh: without.
    """

    cached: Turn
    fresh: Turn


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything that was measured.

    Attributes:
        together: several sessions, a pair each turn.
        alone: one session.
        sessions: how many are several.
    """

    together: list[Pair]
    alone: list[Pair]
    sessions: int


def by_length(pairs: Sequence[Pair], bucket: int) -> list[tuple[list[Call], list[Call]]]:
    """The calls of all turns, cached and fresh, in groups of similar prompts, the shortest first.

    Args:
        pairs: the turns.
        bucket: see `report`.
    """
    groups: dict[int, tuple[list[Call], list[Call]]] = {}
    longest = max(call.prompt_tokens for pair in pairs for call in pair.cached.calls)
    for pair in pairs:
        for n, turn in enumerate((pair.cached, pair.fresh)):
            for call in turn.calls:
                groups.setdefault((longest - call.prompt_tokens) // bucket, ([], []))[n].append(call)
    return [groups[group] for group in sorted(groups, reverse=True)]


def first_tokens(pairs: Sequence[Pair], bucket: int, cpu: bool) -> Iterator[str]:
    """The table of times to the first token.

    Args:
        pairs: the turns.
        bucket: see `report`.
        cpu: add CPU time, medians.
    """

    def line(cells: Sequence[str]) -> str:
        return "".join(
            cell.rjust(width) for cell, width in zip(cells, (12, 7, 12, 8, 12, 8, 11, 11, 12, 8, 8), strict=False)
        )

    titles = ["prompt", "calls", "cached p50", "p95", "fresh p50", "p95", "p50 ratio", "p95 ratio"]
    yield line([*titles, *(["CPU cached", "fresh", "ratio"] if cpu else [])])
    for cached, fresh in by_length(pairs, bucket):
        lengths = sorted({call.prompt_tokens for call in cached})
        (c50, c95), (f50, f95) = (
            np.percentile([call.first_seconds for call in calls], (50, 95)) for calls in (cached, fresh)
        )
        numbers = [f"{x:.3f}" for x in (c50, c95, f50, f95)] + [f"{f50 / c50:.2f}", f"{f95 / c95:.2f}"]
        if cpu:
            ours, other = (median(call.first_cpu for call in calls) for calls in (cached, fresh))
            numbers += [f"{ours:.3f}", f"{other:.3f}", f"{other / ours:.2f}"]
        yield line(["–".join(map(str, sorted({lengths[0], lengths[-1]}))), f"{len(cached)}", *numbers])


def totals(pairs: Sequence[Pair]) -> Iterator[str]:
    """The table of whole tasks: medians of the turns, and ratios' medians within a turn."""

    def line(name: str, hour: str, cpu: str, hits: str) -> str:
        return f"{name:>12}{hour:>12}{cpu:>12}{hits:>10}".rstrip()

    yield line("", "tasks/hour", "CPU s/task", "hit rate")
    for name in ("cached", "fresh"):
        turns = [getattr(pair, name) for pair in pairs]
        hour, cpu, hits = (
            median(getattr(turn, of) for turn in turns) for of in ("tasks_per_hour", "cpu_per_task", "hit_rate")
        )
        yield line(name, f"{hour:.1f}", f"{cpu:.2f}", f"{hits:.1%}")
    hour = median(pair.cached.tasks_per_hour / pair.fresh.tasks_per_hour for pair in pairs)
    cpu = median(pair.cached.cpu_per_task / pair.fresh.cpu_per_task for pair in pairs)
    yield line("ratio", f"{hour:.2f}", f"{cpu:.2f}", "")


def report(measured: Measured, bucket: int) -> str:
    """The tables.

    Args:
        measured: what is in them.
        bucket: prompts are grouped by length; the lengths of a group span so many tokens.
    """
    lines = []
    for name, pairs in (("one session alone", measured.alone), (f"{measured.sessions} sessions", measured.together)):
        if pairs:
            calls = sum(len(pair.cached.calls) for pair in pairs)
            lines.append(f"{name}, {calls} calls; seconds to the first token")
            lines += [*first_tokens(pairs, bucket, pairs is measured.alone), *totals(pairs), ""]
    lines.append(f"of {len(measured.together)} turns; CPU time is that of the whole process")
    return "\n".join(lines)
