"""Attention under a mask, tile by tile with a running softmax; windows that no query of a block selects are not read.

The backward pass computes the tiles anew (as FlashAttention does, arXiv 2205.14135), so that nothing of the size of
queries × rows is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from glmjax.pallas import blocks
from glmjax.pallas.precision import einsum

_LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def masked_attention(
    q_BTNC: Float[Array, "B T N C"],
    rows_BSC: Float[Array, "B S C"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
    value_width: int,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """Softmax over the allowed rows (float32), their first R entries' sum under it, and the log of the softmax's sum.

    A query that may see nothing gets zeros and −inf. Rows that no query may see are not noticed, NaN included.

    Args:
        q_BTNC: queries.
        rows_BSC: keys, whose first R entries are the values.
        mask_BTS: what each query may see.
        scale: factor on the scores.
        value_width: R.
    """

    def block(queries: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _forward_block(*queries, rows_BSC, scale, value_width)

    length, size = q_BTNC.shape[1], _block_size(q_BTNC, rows_BSC)
    return blocks.join(lax.map(block, blocks.split((q_BTNC, mask_BTS), size)), length)


def _block_size(q_BTNC: jax.Array, rows_BSC: jax.Array) -> int:
    batch, length, heads, _ = q_BTNC.shape
    return blocks.block_size(length, 4 * batch * heads * min(blocks.WINDOW, rows_BSC.shape[1]))


def _windows(mask_BTS: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of the windows in which anything is allowed, in order, and how many they are."""
    length = mask_BTS.shape[2]
    count = -(-length // window)
    any_S = jnp.pad(jnp.any(mask_BTS, axis=(0, 1)), (0, count * window - length))
    any_W = jnp.any(any_S.reshape(count, window), axis=1)
    return jnp.argsort(~any_W, stable=True), jnp.sum(any_W, dtype=jnp.int32)


def _window(rows_BSC: jax.Array, mask_BTS: jax.Array, n: jax.Array, window: int) -> tuple[jax.Array, ...]:
    """Where window n starts, its rows (zero where nobody may see them) and its part of the mask."""
    start = blocks.window_start(n, window, rows_BSC.shape[1])
    rows_BWC = lax.dynamic_slice_in_dim(rows_BSC, start, window, 1)
    mask_BTW = lax.dynamic_slice_in_dim(mask_BTS, start, window, 2)
    mask_BTW &= start + jnp.arange(window) >= n * window  # the last window may begin within the one before
    return start, jnp.where(jnp.any(mask_BTW, axis=1)[..., None], rows_BWC, 0), mask_BTW


def _forward_block(
    q_BTNC: jax.Array, mask_BTS: jax.Array, rows_BSC: jax.Array, scale: float, value_width: int
) -> tuple[jax.Array, jax.Array]:
    window = min(blocks.WINDOW, rows_BSC.shape[1])
    order_W, count = _windows(mask_BTS, window)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best_BTN, total_BTN, sum_BTNR = carry
        _, rows_BWC, mask_BTW = _window(rows_BSC, mask_BTS, order_W[i], window)
        allowed_BTNW = mask_BTW[:, :, None]
        scores_BTNW = einsum("BTNC,BWC->BTNW", q_BTNC, rows_BWC, out=jnp.float32) * scale
        scores_BTNW = jnp.where(allowed_BTNW, scores_BTNW, _LOWEST)
        better_BTN = jnp.maximum(best_BTN, jnp.max(scores_BTNW, axis=-1))
        weights_BTNW = jnp.where(allowed_BTNW, jnp.exp(scores_BTNW - better_BTN[..., None]), 0.0)
        shrink_BTN = jnp.exp(best_BTN - better_BTN)
        values_BWR = rows_BWC[..., :value_width]
        added_BTNR = einsum("BTNW,BWR->BTNR", weights_BTNW.astype(values_BWR.dtype), values_BWR, out=jnp.float32)
        total_BTN = total_BTN * shrink_BTN + jnp.sum(weights_BTNW, axis=-1)
        return better_BTN, total_BTN, sum_BTNR * shrink_BTN[..., None] + added_BTNR

    heads = q_BTNC.shape[:3]
    start = (jnp.full(heads, _LOWEST), jnp.zeros(heads), jnp.zeros((*heads, value_width)))
    best_BTN, total_BTN, sum_BTNR = lax.fori_loop(0, count, step, start)
    some_BTN = total_BTN > 0
    total_BTN = jnp.where(some_BTN, total_BTN, 1.0)
    lse_BTN = jnp.where(some_BTN, best_BTN + jnp.log(total_BTN), -jnp.inf)
    return (sum_BTNR / total_BTN[..., None]).astype(q_BTNC.dtype), lse_BTN


def _forward(
    q_BTNC: jax.Array, rows_BSC: jax.Array, mask_BTS: jax.Array, scale: float, value_width: int
) -> tuple[Any, Any]:
    out_BTNR, lse_BTN = masked_attention(q_BTNC, rows_BSC, mask_BTS, scale, value_width)
    return (out_BTNR, lse_BTN), (q_BTNC, rows_BSC, mask_BTS, out_BTNR, lse_BTN)


def _backward(scale: float, value_width: int, saved: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, None]:
    q_BTNC, rows_BSC, mask_BTS, out_BTNR, lse_BTN = saved
    dout_BTNR, dlse_BTN = cotangents
    window = min(blocks.WINDOW, rows_BSC.shape[1])
    # d score = weight · (d weight − Σ d out · out + d lse), the same Σ for all rows of a query
    common_BTN = dlse_BTN - jnp.sum(dout_BTNR.astype(jnp.float32) * out_BTNR.astype(jnp.float32), axis=-1)
    lse_BTN = jnp.where(jnp.isfinite(lse_BTN), lse_BTN, 0.0)

    def block(drows_BSC: jax.Array, queries: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_BTNC, mask_BTS, lse_BTN, common_BTN, dout_BTNR = queries
        order_W, count = _windows(mask_BTS, window)

        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dq_BTNC, drows_BSC = carry
            start, rows_BWC, mask_BTW = _window(rows_BSC, mask_BTS, order_W[i], window)
            values_BWR, allowed_BTNW = rows_BWC[..., :value_width], mask_BTW[:, :, None]
            scores_BTNW = einsum("BTNC,BWC->BTNW", q_BTNC, rows_BWC, out=jnp.float32) * scale
            weights_BTNW = jnp.where(allowed_BTNW, jnp.exp(scores_BTNW - lse_BTN[..., None]), 0.0)
            dweights_BTNW = einsum("BTNR,BWR->BTNW", dout_BTNR, values_BWR, out=jnp.float32)
            dscores_BTNW = (weights_BTNW * (dweights_BTNW + common_BTN[..., None]) * scale).astype(q_BTNC.dtype)
            dkeys_BWC = einsum("BTNW,BTNC->BWC", dscores_BTNW, q_BTNC, out=jnp.float32)
            dvalues_BWR = einsum("BTNW,BTNR->BWR", weights_BTNW.astype(q_BTNC.dtype), dout_BTNR, out=jnp.float32)
            drows_BWC = dkeys_BWC.at[..., :value_width].add(dvalues_BWR)
            drows_BWC += lax.dynamic_slice_in_dim(drows_BSC, start, window, 1)
            dq_BTNC += einsum("BTNW,BWC->BTNC", dscores_BTNW, rows_BWC, out=jnp.float32)
            return dq_BTNC, lax.dynamic_update_slice_in_dim(drows_BSC, drows_BWC, start, 1)

        nothing_BTNC = jnp.zeros(q_BTNC.shape, jnp.float32)
        dq_BTNC, drows_BSC = lax.fori_loop(0, count, step, (nothing_BTNC, drows_BSC))
        return drows_BSC, dq_BTNC.astype(q_BTNC.dtype)

    length, size = q_BTNC.shape[1], _block_size(q_BTNC, rows_BSC)
    queries = blocks.split((q_BTNC, mask_BTS, lse_BTN, common_BTN, dout_BTNR), size)
    drows_BSC, dq_BTNC = lax.scan(block, jnp.zeros(rows_BSC.shape, jnp.float32), queries)
    return blocks.join(dq_BTNC, length), drows_BSC.astype(rows_BSC.dtype), None


masked_attention.defvjp(_forward, _backward)
