"""What the network asks of a KV cache, and the contiguous one: a stretch of rows per sequence.

**Rows.** A latent row is [kv latent after its norm (R) | rotated shared key (P)], an index row the rotated index key.
Layer L of the latents is the MTP layer, whose row p holds (embedding of token p, hidden of p − 1), rotated at p − 1; so
every row depends only on the tokens up to its own, and the MTP row 0, which has no hidden before it, is never visible.

**Rollback.** Rows beyond a query's position are invisible, and appending comes before selecting: rejected drafts need
no clean-up, their rows are overwritten before they can be seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from glmjax.model.config import GlmConfig
from glmjax.pallas.packed_rows import PackedRows
from glmjax.pallas.rows import Rows
from glmjax.pallas.select import select
from glmjax.pallas.selection import Selection
from glmjax.pallas.sparse_attention import sparse_attention

FP8 = jnp.dtype(jnp.float8_e4m3fn)
"""The dtype that stands for packed rows (`glmjax.pallas.packed_rows`)."""


def row_dtype(name: Any) -> jnp.dtype:
    """The dtype of cached rows by its name, or itself: "float32", "bfloat16" or "fp8".

    Raises:
        ValueError: rows cannot be cached in it.
    """
    dtype = FP8 if isinstance(name, str) and name == "fp8" else jnp.dtype(name)
    if dtype not in (jnp.float32, jnp.bfloat16, FP8):
        raise ValueError(f'kv_cache_dtype is {dtype}; rows are cached in float32, bfloat16 or "fp8"')
    return dtype


def empty_rows(
    config: GlmConfig, pages: int, page_size: int, dtype: Any, model_dtype: Any, *, layers: int, indexers: int
) -> tuple[Rows, Rows]:
    """Arenas of latents and of index keys.

    Args:
        config: the model's.
        pages: G.
        page_size: A.
        dtype: of the rows; `FP8` packs them: latents but for their rotary part, and index keys.
        model_dtype: of packed rows when they are read.
        layers: that have latents.
        indexers: that have index keys.
    """

    def rows(layers: int, width: int, exact: int) -> Rows:
        packed = PackedRows(width, exact, jnp.dtype(model_dtype)) if dtype == FP8 else None
        return Rows.zeros(layers, pages, page_size, width, dtype, packed)

    return rows(layers, config.cache_row_dim, config.qk_rope_head_dim), rows(indexers, config.index_head_dim, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """The tokens of one forward and what they may see; made by the cache, which has checked them.

    Attributes:
        positions_BT: each token's row and rotary position; −1 for padding, which writes and sees nothing.
        first_BT: the lowest row each token sees: 0, or its document's start in packed training.
        slots_BT: where in the arena each token's rows go; out of range to drop the write.
        pages_BM: each sequence's pages in order, or None where page b is sequence b's only one.
    """

    positions_BT: jax.Array
    first_BT: jax.Array
    slots_BT: jax.Array
    pages_BM: jax.Array | None = None

    def mtp(self) -> Step:
        """The same tokens as the MTP layer sees them: the first row of a sequence has no hidden state before it."""
        return dataclasses.replace(self, first_BT=self.first_BT + 1)


@runtime_checkable
class Cache(Protocol):
    """What the network calls. Caches are frozen pytrees: writing returns the next one, reading returns results."""

    @property
    def capacity(self) -> int:
        """S, rows a sequence can have; the size of the widest selection."""
        ...

    def step(self, positions_BT: jax.Array, first_BT: jax.Array | None = None) -> Step:
        """Plan a forward: where these tokens' rows go and what they see."""
        ...

    def append(self, layer: Any, rows_BTC: jax.Array, step: Step) -> Cache:
        """Write latent rows of a layer."""
        ...

    def append_index(self, ordinal: Any, keys_BTJ: jax.Array, step: Step) -> Cache:
        """Write index keys; `ordinal` counts the layers that have an indexer."""
        ...

    def select(self, ordinal: Any, q_BTIJ: jax.Array, head_weights_BTI: jax.Array, step: Step, k: int) -> Selection:
        """What each token attends to; see `glmjax.pallas.select`."""
        ...

    def attend(
        self, layer: Any, q_BTNC: jax.Array, selected: Selection, step: Step, *, scale: float, value_width: int
    ) -> jax.Array:
        """Attention to selected rows, [B, T, N, R]; see `glmjax.pallas.sparse_attention`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContiguousCache:
    """One stretch of rows per sequence, for `generate`, for whole-sequence forwards and for training.

    Attributes:
        latents: rows of every layer, one page of S rows per sequence.
        index_keys: the same for layers with an indexer.
        tail_BD: hidden state after the final norm of each sequence's last committed token: what the next chunk's first
            MTP row needs.
        layered: False where every layer overwrites the one entry that is kept: then memory does not grow with depth,
            and the cache serves a single forward over whole sequences.
    """

    latents: Rows
    index_keys: Rows
    tail_BD: jax.Array
    layered: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def create(
        cls,
        config: GlmConfig,
        batch: int,
        capacity: int,
        dtype: Any,
        *,
        model_dtype: Any = None,
        mtp: bool = False,
        layered: bool = True,
    ) -> ContiguousCache:
        """An empty cache.

        Args:
            config: the model's.
            batch: sequences.
            capacity: S, rows per sequence.
            dtype: of rows and tail: the model's, or a narrower one.
            model_dtype: the model's, of packed rows (`FP8`) when they are read and of the tail beside them.
            mtp: whether the MTP layer has rows.
            layered: see the class.

        Raises:
            ValueError: rows are to be packed and `model_dtype` is not given.
        """
        if dtype == FP8 and model_dtype is None:
            raise ValueError("rows in FP8 are read in the model's dtype; give model_dtype")
        extra = int(mtp)
        layers = config.num_hidden_layers + extra if layered else 1
        indexers = config.indexer_types.count("full") + extra if layered else 1
        rows = empty_rows(config, batch, capacity, dtype, model_dtype, layers=layers, indexers=indexers)
        tail_BD = jnp.zeros((batch, config.hidden_size), model_dtype if dtype == FP8 else dtype)
        return cls(*rows, tail_BD, layered)

    @property
    def capacity(self) -> int:
        """S."""
        return self.latents.page_size

    def step(self, positions_BT: jax.Array, first_BT: jax.Array | None = None) -> Step:
        """Rows beyond the capacity are dropped like padding: a caller checks lengths before, on the host."""
        positions_BT = positions_BT.astype(jnp.int32)
        first_BT = jnp.zeros_like(positions_BT) if first_BT is None else first_BT
        inside_BT = (positions_BT >= 0) & (positions_BT < self.capacity)
        start_B1 = jnp.arange(positions_BT.shape[0], dtype=jnp.int32)[:, None] * self.capacity
        return Step(positions_BT, first_BT, jnp.where(inside_BT, start_B1 + positions_BT, -1))

    def append(self, layer: Any, rows_BTC: jax.Array, step: Step) -> ContiguousCache:
        """See `Cache`."""
        return dataclasses.replace(self, latents=self.latents.append(self._entry(layer), rows_BTC, step.slots_BT))

    def append_index(self, ordinal: Any, keys_BTJ: jax.Array, step: Step) -> ContiguousCache:
        """See `Cache`."""
        keys = self.index_keys.append(self._entry(ordinal), keys_BTJ, step.slots_BT)
        return dataclasses.replace(self, index_keys=keys)

    def select(self, ordinal: Any, q_BTIJ: jax.Array, head_weights_BTI: jax.Array, step: Step, k: int) -> Selection:
        """See `Cache`."""
        entry = self._entry(ordinal)
        return select(
            q_BTIJ, head_weights_BTI, self.index_keys, entry, step.pages_BM, step.first_BT, step.positions_BT, k
        )

    def attend(
        self, layer: Any, q_BTNC: jax.Array, selected: Selection, step: Step, *, scale: float, value_width: int
    ) -> jax.Array:
        """See `Cache`."""
        entry = self._entry(layer)
        return sparse_attention(q_BTNC, self.latents, entry, step.pages_BM, selected, scale, value_width)[0]

    def commit(self, step: Step, hidden_BTD: jax.Array) -> ContiguousCache:
        """Keep the last token's hidden state; call it once a chunk's rows, the MTP layer's too, are written."""
        return dataclasses.replace(self, tail_BD=last_token(step, hidden_BTD, self.tail_BD))

    def _entry(self, layer: Any) -> jax.Array:
        return jnp.asarray(layer if self.layered else 0, jnp.int32)


def whole_sequences(
    config: GlmConfig, ids_BT: jax.Array, dtype: Any, first_BT: jax.Array | None = None, *, model_dtype: Any = None
) -> tuple[ContiguousCache, Step]:
    """Cache and plan of one forward over sequences from their first token on; the cache keeps one layer at a time.

    Args:
        config: the model's.
        ids_BT: the tokens, of which only the shape matters.
        dtype: of the rows.
        first_BT: the lowest row each token sees, where a row of tokens holds several documents.
        model_dtype: see `ContiguousCache.create`.
    """
    cache = ContiguousCache.create(config, *ids_BT.shape, dtype, model_dtype=model_dtype, layered=False)
    position_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)
    return cache, cache.step(position_BT, first_BT)


def last_token(step: Step, hidden_BTD: jax.Array, otherwise_BD: jax.Array) -> jax.Array:
    """The hidden state of each sequence's last token that is not padding; `otherwise_BD` where all are."""
    real_BT = step.positions_BT >= 0
    last_B = jnp.max(jnp.where(real_BT, jnp.arange(real_BT.shape[1]), -1), axis=1)
    picked_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(last_B, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((last_B >= 0)[:, None], picked_BD.astype(otherwise_BD.dtype), otherwise_BD)


def previous_hidden(hidden_BTD: jax.Array, tail_BD: jax.Array) -> jax.Array:
    """The hidden state before each token of a chunk: shifted by one, the tail first. What MTP rows are made from."""
    return jnp.concatenate([tail_BD[:, None].astype(hidden_BTD.dtype), hidden_BTD[:, :-1]], axis=1)
