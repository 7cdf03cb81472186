"""The positions with the highest scores: exact, ties to the lowest position on every backend.

What is visible is told by the scores alone, once `comparable` has made them: nothing invisible is above −inf, and nothing
visible at it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int


def by_sorting(scores_BTS: Float[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """Positions of the k best visible scores, by `lax.top_k`, which is stable: the best for few rows or long ones.

    Args:
        scores_BTS: as `comparable` makes them.
        k: at most S.

    Returns:
        Ascending, −1 after them where fewer are visible.
    """
    return ascending(*lax.top_k(scores_BTS, k))


def by_bisection(scores_BTS: Float[Array, "B T S"], k: int) -> Bool[Array, "B T S"]:
    """The same set as a mask: the k-th largest key bit by bit, until no more than k are left or all bits are known, then
    the last of its equals to be taken. No sort; no bit where no more than k are visible.

    Args:
        scores_BTS: as `comparable` makes them.
        k: at most S.
    """
    bits_BTS = lax.bitcast_convert_type(scores_BTS, jnp.int32)
    lowest, visible_BTS = jnp.iinfo(jnp.int32).min, scores_BTS != -jnp.inf
    key_BTS = jnp.where(bits_BTS < 0, bits_BTS ^ jnp.int32(0x7FFFFFFF), bits_BTS)  # ordered as the floats are
    key_BTS = jnp.where(visible_BTS, key_BTS, lowest)

    def unsettled(carry: tuple[jax.Array, ...]) -> jax.Array:
        bit, _, count_BT = carry
        return (bit >= 0) & jnp.any(count_BT > k)

    def key_bit(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # Bit 31 first: adding 2^31 to the smallest integer wraps to 0, which is the sign's half.
        bit, threshold_BT, count_BT = carry
        raised_BT = threshold_BT + lax.shift_left(jnp.int32(1), bit)
        above_BT = _count(key_BTS >= raised_BT[..., None])
        enough = above_BT >= k
        return bit - 1, jnp.where(enough, raised_BT, threshold_BT), jnp.where(enough, above_BT, count_BT)

    lowest_BT = jnp.full(key_BTS.shape[:-1], lowest, jnp.int32)
    _, threshold_BT, _ = lax.while_loop(unsettled, key_bit, (jnp.int32(31), lowest_BT, _count(visible_BTS)))
    above_BTS = key_BTS > threshold_BT[..., None]
    equal_BTS = visible_BTS & (key_BTS == threshold_BT[..., None])
    wanted_BT = k - _count(above_BTS)
    length = scores_BTS.shape[-1]
    position_S, bits = jnp.arange(length, dtype=jnp.int32), length.bit_length()

    def end_bit(i: jax.Array, end_BT: jax.Array) -> jax.Array:
        raised_BT = end_BT + lax.shift_left(jnp.int32(1), jnp.int32(bits - 1) - i)
        enough = _count(equal_BTS & (position_S < raised_BT[..., None])) <= wanted_BT
        return jnp.where(enough, raised_BT, end_BT)

    tied = jnp.any(_count(equal_BTS) > wanted_BT)  # else every equal one is taken, wherever it stands
    nowhere_BT = jnp.zeros_like(wanted_BT)
    end_BT = lax.fori_loop(0, jnp.where(tied, bits, 0), end_bit, nowhere_BT)
    end_BT = jnp.where(tied, end_BT, length)
    return above_BTS | (equal_BTS & (position_S < end_BT[..., None]))


def _count(flag_BTS: jax.Array) -> jax.Array:
    """How many are set along the last axis: in up to 32 bytes per lane first, of which XLA on the CPU adds many at a time."""
    length = flag_BTS.shape[-1]
    lanes = max(64, 1 << (-(-length // 32) - 1).bit_length())
    padded_BTS = jnp.pad(flag_BTS, ((0, 0), (0, 0), (0, -length % lanes)))
    byte_BTC = jnp.sum(padded_BTS.reshape(*flag_BTS.shape[:-1], -1, lanes), axis=-2, dtype=jnp.uint8)
    return jnp.sum(byte_BTC, axis=-1, dtype=jnp.int32)


def by_placing(scores_BTS: Float[Array, "B T S"], k: int) -> Int[Array, "B T K"]:
    """What `by_sorting` gives, by bisection and counting: the best for few rows that are not long.

    Args:
        scores_BTS: as `comparable` makes them.
        k: at most S.
    """
    chosen_BTS = by_bisection(scores_BTS, k)
    batch, queries, length = chosen_BTS.shape
    # In blocks of about √S: which block has the n-th, and where in it. XLA on the CPU scatters one number after another,
    # and a running sum takes it longer than two small products do, which are exact.
    size = 1 << (length.bit_length() - 1) // 2
    blocks = -(-length // size)
    padded_BTS = jnp.pad(chosen_BTS, ((0, 0), (0, 0), (0, blocks * size - length)))
    inner_BTNC = _running_sum(padded_BTS.reshape(batch, queries, blocks, size).astype(jnp.float32))
    outer_BTN = _running_sum(inner_BTNC[..., -1])
    place_K = jnp.arange(k, dtype=jnp.float32)
    block_BTK = jnp.sum(outer_BTN[..., None, :] <= place_K[:, None], axis=-1, dtype=jnp.int32)
    found_BTK = jnp.minimum(block_BTK, blocks - 1)
    before_BTK = jnp.take_along_axis(outer_BTN - inner_BTNC[..., -1], found_BTK, axis=-1)
    inner_BTKC = jnp.take_along_axis(inner_BTNC, found_BTK[..., None], axis=2)
    offset_BTK = jnp.sum(inner_BTKC <= (place_K - before_BTK)[..., None], axis=-1, dtype=jnp.int32)
    return jnp.where(block_BTK < blocks, block_BTK * size + offset_BTK, -1)


def _running_sum(numbers_BTXN: jax.Array) -> jax.Array:
    """Over the last axis, as a product with a triangle; float32, exact for counts."""
    length = numbers_BTXN.shape[-1]
    return jnp.matmul(numbers_BTXN, jnp.triu(jnp.ones((length, length))), precision=lax.Precision.HIGHEST)


def comparable(scores_BTS: Float[Array, "B T S"], visible_BTS: Bool[Array, "B T S"]) -> Float[Array, "B T S"]:
    """Scores that every method orders alike: one zero, nothing visible at −inf, everything else there.

    ±0 and denormals are all equal, whether a backend flushes denormals (XLA on the CPU does) or not. −inf counts as the
    lowest finite number, so that what is visible precedes what is not.
    """
    float32 = jnp.finfo(jnp.float32)
    scores_BTS = jnp.where(jnp.abs(scores_BTS) < float32.tiny, 0.0, jnp.maximum(scores_BTS, float32.min))
    return jnp.where(visible_BTS, scores_BTS, -jnp.inf)


def ascending(scores_BTK: Float[Array, "B T K"], position_BTK: Int[Array, "B T K"]) -> Int[Array, "B T K"]:
    """The chosen positions in order, −1 (none) after them, in the place of those at −inf."""
    none = jnp.iinfo(jnp.int32).max
    sorted_BTK = jnp.sort(jnp.where(scores_BTK == -jnp.inf, none, position_BTK), axis=-1)
    return jnp.where(sorted_BTK == none, -1, sorted_BTK)
