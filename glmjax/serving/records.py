"""Pages outside the device: one record each, with what it is of and a checksum, in a store of bounded size."""

from __future__ import annotations

import dataclasses
import zlib
from collections import OrderedDict
from collections.abc import Sequence

import jax
import numpy as np

from glmjax.serving.pages import PageRecords
from glmjax.serving.tree import Prefix


class CorruptRecordError(ValueError):
    """A record is not what was stored: bits have changed. It must not land; its tokens have to be read again."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One page.

    Attributes:
        prefix: what it is of.
        page: `PageRecords` of one page, in NumPy.
        checksum: CRC-32 of both.
    """

    prefix: Prefix
    page: PageRecords
    checksum: int

    @classmethod
    def of(cls, prefix: Prefix, page: PageRecords) -> Record:
        """A record of what was collected."""
        return cls(prefix, page, _checksum(prefix, page))

    @property
    def size(self) -> int:
        """Bytes of its rows and tail."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.page))

    def checked(self, prefix: Prefix) -> PageRecords:
        """The page, if it is of this prefix and as it was stored.

        Raises:
            CorruptRecordError: it is not.
        """
        if self.prefix != prefix:
            raise CorruptRecordError(
                f"the record of page {self.prefix.pages} of a prefix was asked for as another's; drop it"
            )
        if (found := _checksum(self.prefix, self.page)) != self.checksum:
            raise CorruptRecordError(
                f"checksum {found:#010x} instead of {self.checksum:#010x} of page {self.prefix.pages} "
                "of a prefix; drop it and read the tokens again"
            )
        return self.page


class Store:
    """Records in the host's memory, the longest unused dropped first.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int):
        self._capacity, self._size = capacity, 0
        self._records: OrderedDict[Prefix, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, prefix: Prefix) -> bool:
        return prefix in self._records

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def put(self, record: Record) -> None:
        """Keep a record, in the place of an older one of the same prefix. One that is too large is not kept."""
        self.drop(record.prefix)
        if record.size <= self._capacity:
            self._records[record.prefix] = record
            self._size += record.size
        while self._size > self._capacity:
            self.drop(next(iter(self._records)))

    def get(self, prefix: Prefix) -> Record | None:
        """The record of a prefix, or None; a use."""
        if prefix in self._records:
            self._records.move_to_end(prefix)
        return self._records.get(prefix)

    def drop(self, prefix: Prefix) -> None:
        """Forget a record."""
        if (record := self._records.pop(prefix, None)) is not None:
            self._size -= record.size

    def clear(self) -> None:
        """Forget all of them."""
        self._records.clear()
        self._size = 0


def split(records: PageRecords) -> list[PageRecords]:
    """Records of one page each, in NumPy."""
    whole = jax.tree.map(np.asarray, records)
    return [jax.tree.map(lambda leaf, at=n: _pages(leaf, at), whole) for n in range(len(whole.ready_Z))]


def _pages(leaf: np.ndarray, n: int) -> np.ndarray:
    """Page n of a leaf [Z, …] or [L, Z, …], copied, so that it does not keep the others alive."""
    return (leaf[n : n + 1] if leaf.ndim <= 2 else leaf[:, n : n + 1]).copy()


def joined(pages: Sequence[PageRecords]) -> PageRecords:
    """Records of one page each as one, for landing together."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=0 if leaves[0].ndim <= 2 else 1), *pages)


def _checksum(prefix: Prefix, page: PageRecords) -> int:
    code = zlib.crc32(prefix.digest, zlib.crc32(repr(prefix.namespace).encode()))
    for leaf in jax.tree.leaves(page):
        code = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, code)
    return code
