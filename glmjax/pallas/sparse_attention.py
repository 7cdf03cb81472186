"""Absorbed multi-head latent attention to the selected rows of a cache (model-spec: MLA, Mask)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from glmjax.pallas.blocks import map_query_blocks
from glmjax.pallas.precision import einsum
from glmjax.pallas.rows import Rows

_DENSE_RATIO = 4  # up to so many times the selected rows, masking all rows beats gathering the selected ones


def sparse_attention(
    q_BTNC: Float[Array, "B T N C"],
    rows: Rows,
    layer: Int[Array, ""] | int,
    pages_BM: Int[Array, "B M"] | None,
    selected_BTK: Int[Array, "B T K"],
    scale: float,
    value_width: int,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """Softmax over the selected rows (float32) and their latents' sum under it; and the log of the softmax's sum.

    A query that selects nothing gets zeros and −inf. What unselected rows hold is not noticed, be it NaN (0 · NaN is NaN):
    they may be another request's leavings in a recycled page.

    Args:
        q_BTNC: absorbed queries [K_hᵀ q_nope | q_rope].
        rows: latent rows [latent (R) | rotated key (P)] of all layers.
        layer: which layer's rows.
        pages_BM: each sequence's pages in order, or None where page b is sequence b's only one.
        selected_BTK: positions within the sequence, −1 for none.
        scale: factor on the scores.
        value_width: R.
    """
    batch, queries, heads, _ = q_BTNC.shape
    selected, length = selected_BTK.shape[2], rows.capacity(pages_BM)
    if queries > 1 and length <= _DENSE_RATIO * selected:
        rows_BSC = rows.of_sequences(layer, pages_BM)

        def masked(q_BTNC: jax.Array, selected_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Every row is scored, those not selected are masked: matrix products and no gather, for prefill."""
            allowed_BTS = _as_mask(selected_BTK, length)
            used_BSC = jnp.where(jnp.any(allowed_BTS, axis=1)[..., None], rows_BSC, 0)
            scores_BTNS = einsum("BTNC,BSC->BTNS", q_BTNC, used_BSC, out=jnp.float32) * scale
            weights_BTNS, lse_BTN = _softmax(scores_BTNS, allowed_BTS)
            values_BSR = used_BSC[..., :value_width]
            return _weighted("BTNS,BSR->BTNR", weights_BTNS, values_BSR, q_BTNC.dtype), lse_BTN

        return map_query_blocks(masked, 4 * batch * heads * length, q_BTNC, selected_BTK)

    def gathered(q_BTNC: jax.Array, selected_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Only the selected rows are read: for decode, and for prefill of contexts much longer than the selection."""
        rows_BTKC = rows.gather(layer, pages_BM, jnp.maximum(selected_BTK, 0))
        rows_BTKC = jnp.where(selected_BTK[..., None] >= 0, rows_BTKC, 0)
        scores_BTNK = einsum("BTNC,BTKC->BTNK", q_BTNC, rows_BTKC, out=jnp.float32) * scale
        weights_BTNK, lse_BTN = _softmax(scores_BTNK, selected_BTK >= 0)
        values_BTKR = rows_BTKC[..., :value_width]
        return _weighted("BTNK,BTKR->BTNR", weights_BTNK, values_BTKR, q_BTNC.dtype), lse_BTN

    per_query = batch * selected * (rows.row_bytes + 4 * heads)
    return map_query_blocks(gathered, per_query, q_BTNC, selected_BTK)


def _as_mask(selected_BTK: jax.Array, length: int) -> jax.Array:
    batch, queries, _ = selected_BTK.shape
    b, t = jnp.indices((batch, queries), sparse=True)
    column_BTK = jnp.where(selected_BTK < 0, length, selected_BTK)
    empty = jnp.zeros((batch, queries, length), bool)
    return empty.at[b[..., None], t[..., None], column_BTK].set(True, mode="drop")


def _softmax(scores_BTNK: jax.Array, allowed_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights over the last axis and the log of their sum; zeros and −inf where nothing is allowed."""
    allowed_BTNK = allowed_BTK[:, :, None, :]
    scores_BTNK = jnp.where(allowed_BTNK, scores_BTNK, jnp.finfo(jnp.float32).min)
    best_BTN1 = jax.lax.stop_gradient(jnp.max(scores_BTNK, axis=-1, keepdims=True))
    weights_BTNK = jnp.where(allowed_BTNK, jnp.exp(scores_BTNK - best_BTN1), 0.0)
    total_BTN1 = jnp.sum(weights_BTNK, axis=-1, keepdims=True)
    some_BTN1 = total_BTN1 > 0
    lse_BTN1 = jnp.where(some_BTN1, best_BTN1 + jnp.log(jnp.where(some_BTN1, total_BTN1, 1.0)), -jnp.inf)
    return weights_BTNK / jnp.where(some_BTN1, total_BTN1, 1.0), lse_BTN1[..., 0]


def _weighted(spec: str, weights: jax.Array, values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return einsum(spec, weights.astype(values.dtype), values, out=dtype)
