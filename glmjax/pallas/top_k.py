"""The positions with the highest scores: exact, ties to the lowest position on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

_BISECT_ROWS, _BISECT_LENGTH = 16, 16384  # bisection wins for at least so many rows of at most so many scores (CPU)


def top_k(
    scores_BTS: Float[Array, "B T S"], first_BT: Int[Array, "B T"], last_BT: Int[Array, "B T"], k: int
) -> Int[Array, "B T K"]:
    """Positions of the k best visible scores of each query: ascending, −1 after them where fewer are visible.

    ±0 and denormals are all equal, whether a backend flushes denormals (XLA on the CPU does) or not. −inf counts as the
    lowest finite number, so that what is visible precedes what is not. K = min(k, S).

    Args:
        scores_BTS: float32.
        first_BT: the lowest position a query sees.
        last_BT: the highest; below ``first_BT`` it sees nothing.
        k: index_topk.
    """
    length = scores_BTS.shape[-1]
    position_S = jnp.arange(length, dtype=jnp.int32)
    visible_BTS = (position_S >= first_BT[..., None]) & (position_S <= last_BT[..., None])
    k = min(k, length)
    rows = scores_BTS.shape[0] * scores_BTS.shape[1]
    method = by_bisection if rows >= _BISECT_ROWS and length <= _BISECT_LENGTH else by_sorting
    return method(comparable(scores_BTS, visible_BTS), visible_BTS, k)


def comparable(scores_BTS: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Scores that every method orders alike: one zero, nothing visible at −inf, everything else there."""
    float32 = jnp.finfo(jnp.float32)
    scores_BTS = jnp.where(jnp.abs(scores_BTS) < float32.tiny, 0.0, jnp.maximum(scores_BTS, float32.min))
    return jnp.where(visible_BTS, scores_BTS, -jnp.inf)


def ascending(position_BTK: jax.Array) -> jax.Array:
    """Positions in order, −1 (none) after them."""
    none = jnp.iinfo(jnp.int32).max
    sorted_BTK = jnp.sort(jnp.where(position_BTK < 0, none, position_BTK), axis=-1)
    return jnp.where(sorted_BTK == none, -1, sorted_BTK)


def by_sorting(scores_BTS: jax.Array, visible_BTS: jax.Array, k: int) -> jax.Array:
    """`lax.top_k`, which is stable: the best for few rows or long ones."""
    _, selected_BTK = lax.top_k(scores_BTS, k)
    return ascending(jnp.where(jnp.take_along_axis(visible_BTS, selected_BTK, axis=-1), selected_BTK, -1))


def by_bisection(scores_BTS: jax.Array, visible_BTS: jax.Array, k: int) -> jax.Array:
    """The k-th largest key found bit by bit, then ties from the lowest position and compaction: no sort."""
    bits_BTS = lax.bitcast_convert_type(scores_BTS, jnp.int32)
    key_BTS = jnp.where(bits_BTS < 0, bits_BTS ^ jnp.int32(0x7FFFFFFF), bits_BTS)  # ordered as the floats are

    def bit(i: jax.Array, threshold_BT: jax.Array) -> jax.Array:
        # Bit 31 first: adding 2^31 to the smallest integer wraps to 0, which is the sign's half.
        raised_BT = threshold_BT + lax.shift_left(jnp.int32(1), jnp.int32(31) - i)
        enough_BT = jnp.sum(key_BTS >= raised_BT[..., None], axis=-1, dtype=jnp.int32) >= k
        return jnp.where(enough_BT, raised_BT, threshold_BT)

    lowest_BT = jnp.full(key_BTS.shape[:-1], jnp.iinfo(jnp.int32).min, jnp.int32)
    kth_BT1 = lax.fori_loop(0, 32, bit, lowest_BT)[..., None]
    above_BTS, equal_BTS = key_BTS > kth_BT1, key_BTS == kth_BT1
    wanted_BT1 = k - jnp.sum(above_BTS, axis=-1, keepdims=True, dtype=jnp.int32)
    taken_BTS = above_BTS | (equal_BTS & (jnp.cumsum(equal_BTS, axis=-1, dtype=jnp.int32) <= wanted_BT1))
    taken_BTS &= visible_BTS
    slot_BTS = jnp.where(taken_BTS, jnp.cumsum(taken_BTS, axis=-1, dtype=jnp.int32) - 1, k)
    batch, queries, length = scores_BTS.shape
    row_BTS = jnp.arange(batch * queries, dtype=jnp.int32).reshape(batch, queries, 1)
    empty = jnp.full((batch * queries, k), -1, jnp.int32)
    position_BTS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), scores_BTS.shape)
    return empty.at[row_BTS, slot_BTS].set(position_BTS, mode="drop").reshape(batch, queries, k)
