"""Cached rows of all layers: how they are stored, written and read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glmjax.pallas.packed_rows import PackedRows
from glmjax.pallas.stack import take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """An arena of pages per layer, each page A rows of one width.

    The contiguous cache is the arena with one page per sequence, so that every op is written for pages. What is stored
    per row is this class's business alone: ops write and read rows in the model's dtype.

    Attributes:
        values_LGAC: stored rows.
        packed: how they are packed, where they are not stored as they are.
    """

    values_LGAC: Any
    packed: PackedRows | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def zeros(
        cls, layers: int, pages: int, page_size: int, width: int, dtype: Any, packed: PackedRows | None = None
    ) -> Rows:
        """An empty arena; with `packed` of its bytes, whatever the dtype."""
        shape = layers, pages, page_size
        return cls(
            jnp.zeros((*shape, packed.bytes), jnp.uint8) if packed else jnp.zeros((*shape, width), dtype), packed
        )

    @property
    def page_size(self) -> int:
        """A."""
        return self.values_LGAC.shape[2]

    @property
    def width(self) -> int:
        """C."""
        return self.packed.width if self.packed else self.values_LGAC.shape[3]

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return self.values_LGAC.shape[3] * self.values_LGAC.dtype.itemsize

    def append(self, layer: jax.Array | int, rows_BTC: jax.Array, slots_BT: jax.Array) -> Rows:
        """With new rows written: one branch-free scatter, in place on a donated or carried arena.

        Args:
            layer: whose pages.
            rows_BTC: the rows, converted to the stored dtype.
            slots_BT: page · A + offset; a slot outside 0 .. G · A − 1 drops its row.
        """
        _, pages, page_size, _ = self.values_LGAC.shape
        dropped_BT = (slots_BT < 0) | (slots_BT >= pages * page_size)
        page_BT = jnp.where(dropped_BT, pages, slots_BT // page_size)
        stored = self.packed.pack(rows_BTC) if self.packed else rows_BTC.astype(self.values_LGAC.dtype)
        values_LGAC = self.values_LGAC.at[layer, page_BT, slots_BT % page_size].set(stored, mode="drop")
        # Else XLA makes what is read next out of the arena before the write, which then has to be copied whole.
        return dataclasses.replace(self, values_LGAC=lax.optimization_barrier(values_LGAC))

    def of_sequences(self, layer: jax.Array | int, pages_BM: jax.Array | None) -> jax.Array:
        """All rows of each sequence in order, [B, S, C] with S = M · A.

        Args:
            layer: whose pages.
            pages_BM: each sequence's pages, or None where page b is sequence b's only one: then it is a view.
        """
        if pages_BM is None:
            return self._read(take(self.values_LGAC, layer))
        batch, pages = pages_BM.shape
        return self._read(self.values_LGAC[layer, pages_BM].reshape(batch, pages * self.page_size, -1))

    def window(self, layer: jax.Array | int, pages_BM: jax.Array | None, start: jax.Array, size: int) -> jax.Array:
        """Rows start … start + size − 1 of each sequence, [B, size, C]; with a page table both are whole pages."""
        if pages_BM is None:
            starts = [jnp.asarray(i, jnp.int32) for i in (layer, 0, start, 0)]
            _, pages, _, width = self.values_LGAC.shape
            return self._read(lax.dynamic_slice(self.values_LGAC, starts, (1, pages, size, width))[0])
        pages_BM = lax.dynamic_slice_in_dim(pages_BM, start // self.page_size, size // self.page_size, axis=1)
        return self._read(self.values_LGAC[layer, pages_BM].reshape(pages_BM.shape[0], size, -1))

    def window_size(self, pages_BM: jax.Array | None, wanted: int) -> int:
        """Rows of a window of about the wanted size."""
        whole = 1 if pages_BM is None else self.page_size
        return min(max(1, wanted // whole) * whole, self.capacity(pages_BM))

    def gather(self, layer: jax.Array | int, pages_BM: jax.Array | None, position_BTK: jax.Array) -> jax.Array:
        """The rows at positions of each sequence, [B, T, K, C]; nothing else is read."""
        layers, pages, page_size, width = self.values_LGAC.shape
        sequence_B11 = jnp.arange(position_BTK.shape[0], dtype=jnp.int32)[:, None, None]
        page_BTK = sequence_B11 if pages_BM is None else pages_BM[sequence_B11, position_BTK // page_size]
        row_BTK = (jnp.asarray(layer, jnp.int32) * pages + page_BTK) * page_size + position_BTK % page_size
        return self._read(self.values_LGAC.reshape(layers * pages * page_size, width)[row_BTK])

    def pages(self, page_Z: jax.Array) -> Rows:
        """Copies of some pages, as they are stored."""
        return dataclasses.replace(self, values_LGAC=self.values_LGAC[:, page_Z])

    def with_pages(self, page_Z: jax.Array, pages: Rows) -> Rows:
        """With pages of another arena written over these; a page that is out of range is dropped."""
        return dataclasses.replace(self, values_LGAC=self.values_LGAC.at[:, page_Z].set(pages.values_LGAC, mode="drop"))

    def capacity(self, pages_BM: jax.Array | None) -> int:
        """S, rows a sequence can have."""
        return self.page_size * (1 if pages_BM is None else pages_BM.shape[1])

    def _read(self, stored: jax.Array) -> jax.Array:
        return self.packed.unpack(stored) if self.packed else stored
