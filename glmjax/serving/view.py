"""What the network sees of the pages: the `Cache` of one program, over the sequences that take part in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.model.cache import Step
from glmjax.pallas.rows import Rows
from glmjax.pallas.select import select
from glmjax.pallas.selection import Selection
from glmjax.pallas.sparse_attention import sparse_attention
from glmjax.serving.pages import OK, PagedCache, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedView:
    """Rows of all pages, and which of them belong to the program's sequences. A `glmjax.model.cache.Cache`.

    Leases have been looked at when a view is made (`of`), once for the whole program: nobody else runs meanwhile.

    Attributes:
        latents: rows [L, G, A, C].
        index_keys: rows [L', G, A, J].
        pages_BM: int32, each sequence's pages in order; 0 after the last.
        granted_B: int32, rows that a sequence may have; 0 where it takes no part. What lies beyond is dropped.
    """

    latents: Rows
    index_keys: Rows
    pages_BM: Any
    granted_B: Any

    @classmethod
    def of(cls, cache: PagedCache, table: PageTable, fault_B: jax.Array) -> PagedView:
        """The view of the sequences whose verdict is `OK`."""
        granted_B = jnp.where(fault_B == OK, table.capacity_B(cache.page_size), 0)
        return cls(cache.latents, cache.index_keys, jnp.maximum(table.pages_BM, 0), granted_B)

    def back(self, cache: PagedCache, tail_GD: jax.Array, ready_G: jax.Array) -> PagedCache:
        """The cache of the next epoch, with what the program wrote."""
        return dataclasses.replace(
            cache,
            latents=self.latents,
            index_keys=self.index_keys,
            tail_GD=tail_GD,
            ready_G=ready_G,
            epoch=cache.epoch + 1,
        )

    @property
    def capacity(self) -> int:
        """S, rows of the widest table."""
        return self.latents.capacity(self.pages_BM)

    def step(self, positions_BT: jax.Array, first_BT: jax.Array | None = None) -> Step:
        """See `Cache`. What has no row here is padding: of sequences that take no part, and beyond what was granted."""
        positions_BT = positions_BT.astype(jnp.int32)
        inside_BT = (positions_BT >= 0) & (positions_BT < self.granted_B[:, None])
        positions_BT = jnp.where(inside_BT, positions_BT, -1)
        first_BT = jnp.zeros_like(positions_BT) if first_BT is None else first_BT
        page_size = self.latents.page_size
        at_BT = jnp.maximum(positions_BT, 0)
        page_BT = jnp.take_along_axis(self.pages_BM, at_BT // page_size, axis=1)
        slots_BT = jnp.where(inside_BT, page_BT * page_size + at_BT % page_size, -1)
        return Step(positions_BT, first_BT, slots_BT, self.pages_BM)

    def append(self, layer: Any, rows_BTC: jax.Array, step: Step) -> PagedView:
        """See `Cache`."""
        return dataclasses.replace(self, latents=self.latents.append(layer, rows_BTC, step.slots_BT))

    def append_index(self, ordinal: Any, keys_BTJ: jax.Array, step: Step) -> PagedView:
        """See `Cache`."""
        return dataclasses.replace(self, index_keys=self.index_keys.append(ordinal, keys_BTJ, step.slots_BT))

    def select(self, ordinal: Any, q_BTIJ: jax.Array, head_weights_BTI: jax.Array, step: Step, k: int) -> Selection:
        """See `Cache`."""
        visible = step.first_BT, step.positions_BT
        return select(q_BTIJ, head_weights_BTI, self.index_keys, ordinal, step.pages_BM, *visible, k)

    def attend(
        self, layer: Any, q_BTNC: jax.Array, selected: Selection, step: Step, *, scale: float, value_width: int
    ) -> jax.Array:
        """See `Cache`."""
        return sparse_attention(q_BTNC, self.latents, layer, step.pages_BM, selected, scale, value_width)[0]
