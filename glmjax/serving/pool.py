"""The host's mirror of the pages: who holds which, at which version, and which are free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Lease(NamedTuple):
    """A page at a version: the right to read and write it until it is retired.

    Attributes:
        page: which.
        version: its generation while the lease holds.
    """

    page: int
    version: int


class Pool:
    """Pages with reference counts and versions.

    A page is free, held (by sequences, by the prefix tree, by both) or waiting to be retired. It goes from held to
    free by retirement alone: whoever takes it next has another version, so no lease outlives its owner.

    Args:
        pages: G, how many there are.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, pages: int):
        if pages < 1:
            raise ValueError(f"pages {pages} must be at least 1; give the cache more memory")
        self._versions = [0] * pages
        self._references = [0] * pages
        self._free = deque(range(pages))
        self._retiring: list[int] = []

    def __len__(self) -> int:
        return len(self._versions)

    @property
    def free(self) -> int:
        """Pages that can be leased, those waiting for retirement not counted."""
        return len(self._free)

    @property
    def retiring(self) -> int:
        """Pages that the next dispatch retires."""
        return len(self._retiring)

    @property
    def versions(self) -> tuple[int, ...]:
        """Of all pages, retirements of the next dispatch included."""
        return tuple(self._versions)

    def lease(self, count: int) -> list[Lease]:
        """Free pages, each with one reference.

        Raises:
            ValueError: fewer are free; a caller looks before.
        """
        if count > self.free:
            raise ValueError(f"{count} pages are wanted and {self.free} are free; evict or wait before leasing")
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return [Lease(page, self._versions[page]) for page in pages]

    def share(self, leases: Iterable[Lease]) -> None:
        """One more reference to each.

        Raises:
            ValueError: nobody holds one of them at this version.
        """
        for lease in leases:
            self._held(lease)
            self._references[lease.page] += 1

    def release(self, leases: Iterable[Lease]) -> None:
        """One reference less; pages that nobody holds any more are retired by the next dispatch.

        Raises:
            ValueError: nobody holds one of them at this version.
        """
        for lease in leases:
            self._held(lease)
            self._references[lease.page] -= 1
            if not self._references[lease.page]:
                self._retiring.append(lease.page)

    def references(self, lease: Lease) -> int:
        """How often a lease is held; 0 where it holds no longer."""
        return self._references[lease.page] if self._versions[lease.page] == lease.version else 0

    def retire(self, most: int) -> list[int]:
        """Pages for the next dispatch to retire. They are free from now on: what is dispatched later comes after it."""
        pages, self._retiring = self._retiring[:most], self._retiring[most:]
        for page in pages:
            self._versions[page] += 1
        self._free.extend(pages)
        return pages

    def check(self, held: Sequence[Iterable[Lease]]) -> None:
        """Everything adds up.

        Args:
            held: the leases of every holder: each sequence's, and the tree's.

        Raises:
            AssertionError: naming what does not.
        """
        counts = [0] * len(self)
        for leases in held:
            seen = set()
            for page, version in leases:
                assert version == self._versions[page], f"{page=} is held at {version=}, now {self._versions[page]}"
                assert page not in seen, f"{page=} twice with one holder"
                seen.add(page)
                counts[page] += 1
        assert counts == self._references, "references differ from what is held"
        idle = [*self._free, *self._retiring]
        assert len(set(idle)) == len(idle), "a page is free or retiring twice"
        assert not any(counts[page] for page in idle), "a page is free or retiring and held"
        assert len(idle) + sum(map(bool, counts)) == len(self), "a page is neither free, retiring nor held"

    def _held(self, lease: Lease) -> None:
        if not self.references(lease):
            raise ValueError(f"{lease} is not held; the page is at version {self._versions[lease.page]}")
