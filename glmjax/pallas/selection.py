"""Which rows each query attends to: positions or a mask, told apart by dtype as NumPy's two kinds of index arrays are.

  positions   int32 [B, T, K], ascending, −1 after them: for few queries, and for contexts far longer than the selection
  mask        bool [B, T, S]: for many queries, and where everything visible is selected

A mask takes no more than `MASK_RATIO` / 4 times the bytes of positions, and spares sorting, compacting and gathering.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

Selection = Int[Array, "B T K"] | Bool[Array, "B T S"]

FEW_QUERIES = 8  # up to so many per sequence (decode, verification) rows are gathered and keys are streamed
MASK_RATIO = 16  # up to so many times the selected rows, masking all rows beats gathering the selected ones


def is_mask(selected: Selection) -> bool:
    """Whether it is a mask."""
    return selected.dtype == jnp.bool_


def prefers_mask(queries: int, length: int, k: int) -> bool:
    """Whether a selection of k out of `length` rows is made as a mask."""
    return length <= k or (queries > FEW_QUERIES and length <= MASK_RATIO * k)


def nothing(batch: int, queries: int, length: int, k: int) -> Selection:
    """The empty selection, in the form that `select` gives for these sizes."""
    if prefers_mask(queries, length, k):
        return jnp.zeros((batch, queries, length), bool)
    return jnp.full((batch, queries, k), -1, jnp.int32)


def positions(selected: Selection, k: int) -> Int[Array, "B T K"]:
    """The selection as positions, K = min(k, S) of them.

    Args:
        selected: of at most k rows each.
        k: index_topk.
    """
    if not is_mask(selected):
        return selected
    batch, queries, length = selected.shape
    k = min(k, length)
    place_BTS = jnp.cumsum(selected, axis=-1, dtype=jnp.int32) - 1
    b, t = jnp.indices((batch, queries), sparse=True)
    at = b[..., None], t[..., None], jnp.where(selected, place_BTS, k)
    return jnp.full((batch, queries, k), -1, jnp.int32).at[at].set(jnp.arange(length, dtype=jnp.int32), mode="drop")


def mask(position_BTK: Int[Array, "B T K"], length: int) -> Bool[Array, "B T S"]:
    """Positions as a mask over `length` rows."""
    batch, queries, _ = position_BTK.shape
    b, t = jnp.indices((batch, queries), sparse=True)
    column_BTK = jnp.where(position_BTK < 0, length, position_BTK)
    return jnp.zeros((batch, queries, length), bool).at[b[..., None], t[..., None], column_BTK].set(True, mode="drop")


def visible(first_BT: Int[Array, "B T"], last_BT: Int[Array, "B T"], length: int) -> Bool[Array, "B T S"]:
    """Everything from the first to the last position a query sees."""
    position_S = jnp.arange(length, dtype=jnp.int32)
    return (position_S >= first_BT[..., None]) & (position_S <= last_BT[..., None])
