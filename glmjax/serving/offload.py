"""Pages that go to the host's memory when the prefix tree lets go of them, and come back when somebody wants them.

The engine's thread says which pages move with which dispatch; a thread of this module's does what takes long: copies to
the host, checksums, and putting records together. What is on its way is nobody's: the pages it is of may have been
retired meanwhile, the request that wants it may have left. Versions see to that (`glmjax.serving.pages`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from glmjax.serving.faults import Faults
from glmjax.serving.pages import PageRecords
from glmjax.serving.pool import Lease
from glmjax.serving.records import CorruptRecordError, Record, Store, split
from glmjax.serving.tree import Prefix, keys


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """Pages that one dispatch collects, or lands.

    Attributes:
        leases: which.
        prefixes: what they are of.
        pages: of a landing, what goes there.
        ids: of a landing, all tokens up to the end of its last page.
        hook: of one that was recorded, the treatment that its pages were read under (`glmjax.serving.hooks`).
    """

    leases: tuple[Lease, ...]
    prefixes: tuple[Prefix, ...] = ()
    pages: tuple[PageRecords, ...] = ()
    ids: tuple[int, ...] = ()
    hook: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Loading:
    """Pages on their way to a sequence.

    Attributes:
        prefixes: of the pages.
        pages: those that were there, in order; at most one for each lease.
        leases: where they are to land.
        deadline: `time.monotonic()` from which on it is better to read the tokens again.
    """

    prefixes: tuple[Prefix, ...]
    pages: Future[list[PageRecords]]
    leases: tuple[Lease, ...]
    deadline: float


class Offload:
    """The host's memory, and what is on its way there and back.

    Args:
        capacity: bytes of records.
        page_size: A.
        faults: what happens to what is on its way.
        changed: called from another thread when a load has come to its end.

    Attributes:
        corrupt: records that were not what had been stored.
    """

    def __init__(self, capacity: int, page_size: int, faults: Faults, changed: Callable[[], None] = lambda: None):
        self._store, self._page_size, self._faults, self._changed = Store(capacity), page_size, faults, changed
        self._lock = threading.Lock()  # of the store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="glmjax-offload")
        self._moves: list[tuple[int, Move]] = []  # and the dispatch they are due with
        self._dispatches = self.corrupt = 0

    def __len__(self) -> int:
        return len(self._store)

    def begin(self) -> None:
        """With an empty cache: what was to move there or from there stays where it is."""
        self._moves.clear()

    def take(self) -> tuple[Move, ...]:
        """What the next dispatch moves."""
        self._dispatches += 1
        due = tuple(move for at, move in self._moves if at <= self._dispatches)
        self._moves = [(at, move) for at, move in self._moves if at > self._dispatches]
        return due

    def forget(self) -> None:
        """Let go of all records, those on their way included."""
        self.begin()
        self.flush()
        with self._lock:
            self._store.clear()

    def leave(self, evicted: Sequence[tuple[Prefix, Lease]]) -> None:
        """Have the next dispatch collect pages that the tree let go of, unless there are records of them."""
        with self._lock:
            evicted = [(prefix, lease) for prefix, lease in evicted if prefix not in self._store]
        late = [self._faults.of_collection() is not None for _ in evicted]
        for delayed in (False, True):
            chosen = [pair for pair, is_late in zip(evicted, late, strict=True) if is_late == delayed]
            if chosen:
                prefixes, leases = zip(*chosen, strict=True)
                self._later(self._faults.delay if delayed else 0, Move(leases, prefixes))

    def collected(self, move: Move, records: PageRecords, ok_Z: Any) -> None:
        """Keep what a dispatch has collected, as far as it was what it should have been."""
        self._thread.submit(self._keep, move.prefixes, records, ok_Z)

    def find(self, ids: Sequence[int], namespace: Hashable, skip: int) -> list[Prefix]:
        """Of which pages there are records, from a given one on without a gap.

        Args:
            ids: tokens.
            namespace: see `Prefix`.
            skip: pages at the beginning that nobody has to look for.
        """
        prefix, found = Prefix(namespace), []
        with self._lock:
            if not len(self._store):
                return found
            for n, key in enumerate(keys(ids, self._page_size)):
                prefix = prefix.then(key)
                if n >= skip:
                    if prefix not in self._store:
                        break
                    found.append(prefix)
        return found

    def load(self, prefixes: Sequence[Prefix], leases: Sequence[Lease], deadline: float) -> Loading:
        """Fetch and check records."""
        pages = self._thread.submit(self._fetch, tuple(prefixes))
        pages.add_done_callback(lambda _: self._changed())
        return Loading(tuple(prefixes), pages, tuple(leases), deadline)

    def land(self, loading: Loading, ids: Sequence[int], *, late: bool = False) -> int:
        """Have the next dispatch write pages that have come; a later one where a fault delays it.

        Args:
            loading: of which the pages are there.
            ids: tokens of the sequence that they are for.
            late: whether it is delayed.

        Returns:
            How many pages there are.
        """
        pages = tuple(loading.pages.result())
        if pages:
            count, prefixes = len(pages), loading.prefixes[: len(pages)]
            upto = prefixes[-1].pages * self._page_size
            move = Move(loading.leases[:count], prefixes, pages, tuple(ids[:upto]))
            self._later(self._faults.delay if late else 0, move)
        return len(pages)

    def flush(self) -> None:
        """Wait until everything that was collected has been stored."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _later(self, dispatches: int, move: Move) -> None:
        self._moves.append((self._dispatches + dispatches, move))

    def _keep(self, prefixes: tuple[Prefix, ...], records: PageRecords, ok_Z: Any) -> None:
        for prefix, page, ok in zip(prefixes, split(records), np.asarray(jax.device_get(ok_Z)), strict=False):
            if ok:
                record = self._faults.of_record(Record.of(prefix, page))
                with self._lock:
                    self._store.put(record)

    def _fetch(self, prefixes: tuple[Prefix, ...]) -> list[PageRecords]:
        pages: list[PageRecords] = []
        for prefix in prefixes:
            with self._lock:
                record = self._store.get(prefix)
            if record is None:
                break
            try:
                pages.append(record.checked(prefix) if self._faults.versioned else record.page)
            except CorruptRecordError:
                self.corrupt += 1
                with self._lock:
                    self._store.drop(prefix)
                break
        return pages
