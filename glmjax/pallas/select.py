"""The lightning indexer's choice: score every visible position, keep the best (model-spec: Indexer)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from glmjax.pallas.blocks import map_query_blocks
from glmjax.pallas.precision import einsum
from glmjax.pallas.rows import Rows
from glmjax.pallas.top_k import top_k


def select(
    q_BTIJ: Float[Array, "B T I J"],
    head_weights_BTI: Float[Array, "B T I"],
    rows: Rows,
    layer: Int[Array, ""] | int,
    pages_BM: Int[Array, "B M"] | None,
    first_BT: Int[Array, "B T"],
    last_BT: Int[Array, "B T"],
    k: int,
) -> Int[Array, "B T K"]:
    """Positions each query attends to, K = min(k, S): ascending, −1 after them where fewer are visible.

    One op, so that the scores of a long context exist for a block of queries only. Nothing is scored where everything
    visible fits into k.

    Args:
        q_BTIJ: rotated index queries.
        head_weights_BTI: the heads' weights, float32, already scaled by I^-0.5; may be negative.
        rows: index keys of all layers that have an indexer.
        layer: the ordinal among them.
        pages_BM: each sequence's pages in order, or None where page b is sequence b's only one.
        first_BT: the lowest position a query sees.
        last_BT: the highest; below ``first_BT`` it sees nothing.
        k: index_topk.
    """
    length = rows.capacity(pages_BM)
    if k >= length:
        position_BTS = jnp.maximum(first_BT, 0)[..., None] + jnp.arange(length, dtype=jnp.int32)
        return jnp.where(position_BTS <= jnp.minimum(last_BT, length - 1)[..., None], position_BTS, -1)
    keys_BSJ = rows.of_sequences(layer, pages_BM)

    def block(q_BTIJ: jax.Array, head_weights_BTI: jax.Array, first_BT: jax.Array, last_BT: jax.Array) -> jax.Array:
        return top_k(index_scores(q_BTIJ, head_weights_BTI, keys_BSJ), first_BT, last_BT, k)

    batch, _, heads, _ = q_BTIJ.shape
    per_query = 4 * batch * (heads + 4) * length
    return map_query_blocks(block, per_query, q_BTIJ, head_weights_BTI, first_BT, last_BT)


def index_scores(
    q_BTIJ: Float[Array, "B T I J"], head_weights_BTI: Float[Array, "B T I"], keys_BSJ: Float[Array, "B S J"]
) -> Float[Array, "B T S"]:
    """Sum over index heads of weight · relu(q · k · J^-0.5), float32; visibility is not applied."""
    dots_BTIS = einsum("BTIJ,BSJ->BTIS", q_BTIJ, keys_BSJ, out=jnp.float32)
    active_BTIS = jax.nn.relu(dots_BTIS * q_BTIJ.shape[-1] ** -0.5)
    return jnp.sum(active_BTIS * head_weights_BTI[..., None], axis=2)  # fused; as a product it would be many small ones
