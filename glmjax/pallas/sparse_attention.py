"""Attention to the rows that were selected, and to no others (model-spec: MLA, absorbed)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from glmjax.pallas import selection
from glmjax.pallas.blocks import map_query_blocks
from glmjax.pallas.masked_attention import masked_attention
from glmjax.pallas.precision import einsum
from glmjax.pallas.rows import Rows
from glmjax.pallas.selection import Selection


def sparse_attention(
    q_BTNC: Float[Array, "B T N C"],
    rows: Rows,
    layer: Int[Array, ""] | int,
    pages_BM: Int[Array, "B M"] | None,
    selected: Selection,
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
        selected: positions within the sequence, which are gathered, or a mask, under which all rows are read in windows.
        scale: factor on the scores.
        value_width: R.
    """
    if selection.is_mask(selected):
        return masked_attention(q_BTNC, rows.of_sequences(layer, pages_BM), selected, scale, value_width)

    def gathered(q_BTNC: jax.Array, position_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_BTKC = rows.gather(layer, pages_BM, jnp.maximum(position_BTK, 0))
        rows_BTKC = jnp.where(position_BTK[..., None] >= 0, rows_BTKC, 0)
        # The rows first, since XLA on the CPU transposes the second operand: the queries are fewer.
        scores_BTKN = einsum("BTKC,BTNC->BTKN", rows_BTKC, q_BTNC, out=jnp.float32) * scale
        scores_BTNK = jnp.swapaxes(scores_BTKN, 2, 3)
        weights_BTNK, lse_BTN = _softmax(scores_BTNK, position_BTK >= 0)
        # Whole rows: XLA on the CPU would copy the part of them that counts.
        weighted_BTNC = einsum("BTNK,BTKC->BTNC", weights_BTNK.astype(rows_BTKC.dtype), rows_BTKC)
        return weighted_BTNC[..., :value_width].astype(q_BTNC.dtype), lse_BTN

    batch, _, heads, _ = q_BTNC.shape
    per_query = batch * selected.shape[2] * (rows.row_bytes + 4 * heads)
    return map_query_blocks(gathered, per_query, q_BTNC, selected)


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
