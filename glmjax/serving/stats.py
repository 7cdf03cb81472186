"""What an engine takes, and what it has done so far."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineMemory:
    """Bytes of the device that an engine takes.

    Attributes:
        weights: of the model.
        cache: all pages.
        temporaries: of the program that needs most while it runs.
    """

    weights: int
    cache: int
    temporaries: int


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and what is going on now.

    Attributes:
        running: requests with a slot.
        waiting: requests without.
        pages: of the cache.
        free_pages: that nobody holds.
        cached_pages: that the prefix tree holds.
        held_pages: that sequences hold, the prefix tree too or not.
        dispatches: programs run.
        finished: requests that came to their end.
        prompt_tokens: of the requests admitted.
        cached_tokens: of these, found in the prefix tree.
        new_tokens: emitted.
        rounds: of decoding, each sequence's counted; those under a grammar are not.
        drafted: drafts proposed.
        accepted: drafts accepted.
        drafted_at: drafts proposed at each position of a round: the later, the fewer, where drafting adapts.
        accepted_at: of these, accepted.
        forced: tokens to which grammars left no alternative, emitted along with the one after them; no drafts.
        preemptions: sequences whose pages went to others.
        replays: sequences whose pages a fault took.
        suspicions: requests whose drafts were accepted suspiciously seldom or often.
        benign: of these, those whose output came again.
        restarts: those that began anew, unseen, since it did not.
        aborts: those that failed, since it did not and was seen.
        offloaded_pages: of which the host's memory has records.
        landed: pages that came from there.
        dropped: pages that came too late: the one they were for had changed hands.
        corrupt: records that were not what had been stored.
        device_seconds: that programs ran.
        host_seconds: of the engine's thread, waiting aside.
        programs: compiled.
        faults: that were made on purpose, by name.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    held_pages: int = 0
    dispatches: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    forced: int = 0
    preemptions: int = 0
    replays: int = 0
    suspicions: int = 0
    benign: int = 0
    restarts: int = 0
    aborts: int = 0
    offloaded_pages: int = 0
    landed: int = 0
    dropped: int = 0
    corrupt: int = 0
    device_seconds: float = 0.0
    host_seconds: float = 0.0
    programs: int = 0
    faults: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def accept_length(self) -> float:
        """Tokens of a round."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    @property
    def usage(self) -> float:
        """Of the pages, how many sequences hold; the others are free, or make room when they are needed."""
        return self.held_pages / self.pages if self.pages else 0.0

    @property
    def hit_rate(self) -> float:
        """Of prompt tokens, how many were found in the prefix tree."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
