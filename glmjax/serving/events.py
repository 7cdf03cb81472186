"""What comes into the prefix tree and leaves it, in numbered batches: for routers that send requests to where their prefix is.

The engine's thread tells; whoever follows reads in a thread of his own. Only pages of the namespace None are told of: what is
kept under a salt or a treatment is not for everybody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from glmjax.serving.errors import ClosedError
from glmjax.serving.tree import Node, PrefixTree

MOST_BATCHES = 4096
"""That are kept for those who come back."""
MOST_EVENTS = 4096
"""Of a batch that tells what there is: gRPC's messages have 4 MB at most, unless somebody says otherwise."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A page that can be found from now on.

    Attributes:
        digest: of all tokens up to its end.
        before: of those up to its beginning; empty for a first page.
        ids: its own tokens, as int32 bytes.
    """

    digest: bytes
    before: bytes
    ids: bytes

    @classmethod
    def of(cls, node: Node) -> Stored:
        """A page of the tree."""
        return cls(node.prefix.digest, node.parent.prefix.digest, node.key)


@dataclasses.dataclass(frozen=True)
class Removed:
    """A page that cannot be found any more.

    Attributes:
        digest: of all tokens up to its end.
    """

    digest: bytes


@dataclasses.dataclass(frozen=True)
class Cleared:
    """No page can be found any more."""


Event = Stored | Removed | Cleared


@dataclasses.dataclass(frozen=True)
class EventBatch:
    """Events in order.

    Attributes:
        number: consecutive; those of an engine that was made later are larger.
        seconds: since the epoch.
        events: at least one.
    """

    number: int
    seconds: float
    events: tuple[Event, ...]


class LostError(LookupError):
    """Batches that somebody asks for are not kept any more, or never were: begin with what there is now."""


class CacheEvents:
    """Of one engine.

    Args:
        most: batches to keep.
        most_events: of a batch that tells what there is.
    """

    def __init__(self, most: int = MOST_BATCHES, most_events: int = MOST_EVENTS):
        self._most_events = most_events
        self._incomplete: set[int] = set()
        self._number = time.time_ns() >> 10  # a later engine begins later, however many batches this one makes
        self._batches: deque[EventBatch] = deque(maxlen=most)
        self._told: list[Event] = []
        self._watchers: set[Callable[[], None]] = set()
        self._closed = False
        self._lock = threading.Lock()

    # The engine's thread

    def stored(self, node: Node) -> None:
        """The tree has a page more."""
        if node.prefix.namespace is None:
            self._told.append(Stored.of(node))

    def removed(self, node: Node) -> None:
        """The tree has a page less."""
        if node.prefix.namespace is None:
            self._told.append(Removed(node.prefix.digest))

    def cleared(self) -> None:
        """The tree is a new one."""
        self._told.append(Cleared())

    def publish(self) -> None:
        """A batch of what has been told since the last one."""
        if self._told:
            with self._lock:
                self._number += 1
                self._batches.append(EventBatch(self._number, time.time(), tuple(self._told)))
                watchers = list(self._watchers)
            self._told.clear()
            for watcher in watchers:
                watcher()

    def everything(self, tree: PrefixTree) -> tuple[EventBatch, ...]:
        """What there is, as if it had just been stored; what comes after it has the next number.

        Whoever has not got all of these batches cannot go on from the last that he has: `after` tells him so.
        """
        self.publish()
        stored = (Stored.of(node) for node in tree.nodes() if node.prefix.namespace is None)
        pieces = list(itertools.batched(itertools.chain([Cleared()], stored), self._most_events))
        first, now = self._number + 1 - len(pieces), time.time()
        with self._lock:
            oldest = self._number - len(self._batches)
            self._incomplete = {n for n in self._incomplete if n >= oldest} | set(range(first, self._number))
        return tuple(EventBatch(first + n, now, piece) for n, piece in enumerate(pieces))

    # Any thread

    def after(self, number: int) -> tuple[EventBatch, ...]:
        """Batches after one, as many as there are now.

        Raises:
            LostError: some of them are not kept any more, or the number is none of this engine's.
            ClosedError: the engine has been closed: there will be no more.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed; its cache is gone")
            first = self._number - len(self._batches)
            if not first <= number <= self._number or number in self._incomplete:
                raise LostError(f"batch {number} is not among {first}..{self._number}; begin with what there is now")
            return tuple(batch for batch in self._batches if batch.number > number)

    def close(self) -> None:
        """There will be no more."""
        with self._lock:
            self._closed, watchers = True, list(self._watchers)
        for watcher in watchers:
            watcher()

    @contextlib.contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Have a function called, in the engine's thread, whenever there is a new batch, and when there will be no more."""
        with self._lock:
            self._watchers.add(watcher)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.discard(watcher)
