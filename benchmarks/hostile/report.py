"""What came of hostile requests, of those of their neighbours, and of the worker."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

EVERY = 1000
"""Requests after which the worker's memory is looked at."""
UNEXPECTED = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS")
"""Statuses that say that something is wrong with the worker, not with the request."""


class Process(NamedTuple):
    """Of a worker's process (Linux).

    Attributes:
        mib: of resident memory.
        threads: that it has.
        files: descriptors that are open, connections among them.
    """

    mib: float
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """What it has now."""
        status = Path(f"/proc/{pid}/status").read_text()
        resident, threads = (int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
        return cls(resident / 1024, threads, len(list(Path(f"/proc/{pid}/fd").iterdir())))


class Tally:
    """What came of hostile requests. Any thread may call it.

    Args:
        total: how many there will be.
        sample: is called after every 1000 of them.

    Attributes:
        statuses: by kind of request and status.
        unexpected: by kind, status and words: those of which there should be none.
        samples: what `sample` gave.
    """

    def __init__(self, total: int, sample: Callable[[], Process | None] = lambda: None):
        self.statuses: Counter[tuple[str, str]] = Counter()
        self.unexpected: Counter[tuple[str, str, str]] = Counter()
        self.samples: list[Process | None] = []
        self._sample, self._lock = sample, threading.Lock()
        self._bar = tqdm(total=total, unit="request", disable=None)

    def add(self, kind: str, status: str, words: str = "") -> None:
        """One more."""
        with self._lock:
            self.statuses[kind, status] += 1
            if status in UNEXPECTED:
                self.unexpected[kind, status, re.sub(r"\s+", " ", words)[:200]] += 1
            self._bar.update()
            if self.statuses.total() % EVERY == 0:
                self.samples.append(self._sample())

    def close(self) -> None:
        """No more of them."""
        self._bar.close()


@dataclasses.dataclass
class Neighbour:
    """What a client saw that sends valid requests.

    Attributes:
        answers: that came.
        different: of these, from what the same request gave on the quiet worker.
        failed: requests that got none, by status.
        refused: times that the queue was full, after which it tried again.
        slowest: seconds that an answer took.
    """

    answers: int = 0
    different: int = 0
    failed: Counter[str] = dataclasses.field(default_factory=Counter)
    refused: int = 0
    slowest: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What is left of a worker.

    Attributes:
        tally: of hostile requests.
        neighbours: of the others.
        left: what is wrong with the worker now, in words.
        processes: the worker's before, and after; None where it is not known.
        seconds: that it took.
    """

    tally: Tally
    neighbours: tuple[Neighbour, ...]
    left: tuple[str, ...]
    processes: tuple[Process | None, Process | None]
    seconds: float

    @property
    def unexpected(self) -> list[str]:
        """Statuses that no request should meet."""
        found = self.tally.unexpected.most_common()
        return [f"{count:>6} {kind}: {status}: {words}" for (kind, status, words), count in found]

    @property
    def wrong(self) -> list[str]:
        """Whatever else should not be."""
        answers, different = (sum(getattr(one, name) for one in self.neighbours) for name in ("answers", "different"))
        failed = sum(one.failed.total() for one in self.neighbours)
        found = [*self.left]
        if different or failed or not answers:
            found.append(f"of the neighbours' answers {different} are different and {failed} failed, {answers} came")
        return found

    def table(self) -> str:
        """Kinds and what came of them."""
        statuses = self.tally.statuses
        kinds = sorted({kind for kind, _ in statuses})
        names = sorted({status for _, status in statuses}, key=lambda name: (name.isupper(), name))
        widths = [max(8, len(name) + 2) for name in names]
        lines = ["".join([f"{'':<20}", *(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))])]
        for kind in kinds:
            counts = (f"{statuses[kind, name] or '–':>{width}}" for name, width in zip(names, widths, strict=True))
            lines.append("".join([f"{kind:<20}", *counts]))
        return "\n".join(lines)

    def __str__(self) -> str:
        before, after = self.processes
        lines = [f"{self.tally.statuses.total():,} requests in {self.seconds:.0f} s", "", self.table(), ""]
        for one in self.neighbours:
            failed = ", ".join(f"{count} {name}" for name, count in one.failed.items()) or "0"
            lines.append(
                f"neighbour: {one.answers:,} answers, {one.different} different, {failed} failed; {one.refused} times "
                f"told to come again, the slowest answer took {one.slowest:.1f} s"
            )
        if before is not None and after is not None:
            memory = ", ".join(f"{sample.mib:.0f}" for sample in self.tally.samples if sample is not None)
            lines += [
                f"worker: {before.mib:.0f} MiB before, {after.mib:.0f} after; every {EVERY} requests {memory or '–'}",
                f"threads {before.threads} before, {after.threads} after; open files {before.files}, {after.files}",
            ]
        lines += ["", f"unexpected statuses: {sum(self.tally.unexpected.values())}", *self.unexpected[:30]]
        return "\n".join([*lines, "wrong: " + ("; ".join(self.wrong) or "nothing")])
