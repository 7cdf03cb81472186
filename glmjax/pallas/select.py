"""The lightning indexer's choice: score every visible position, keep the best (model-spec: Indexer)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from glmjax.pallas.blocks import map_query_blocks
from glmjax.pallas.precision import einsum
from glmjax.pallas.rows import Rows
from glmjax.pallas.top_k import ascending, comparable, top_k

_FEW_QUERIES = 8  # up to so many per sequence, keys are streamed; more are served by blocks of queries
_WINDOW = 4096  # keys of a sequence that are scored at a time when streamed


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

    One op, so that the scores of a long context never exist as a whole: few queries (decode) pass over windows of keys
    and keep the best so far, up to the last position any of them sees; many (prefill) are taken in blocks. Nothing is
    scored where everything visible fits into k. A selection carries no gradient.

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
    q_BTIJ, head_weights_BTI, rows = lax.stop_gradient((q_BTIJ, head_weights_BTI, rows))
    window = rows.window_size(pages_BM, _WINDOW)
    if q_BTIJ.shape[1] <= _FEW_QUERIES and window < length:
        return _streamed(q_BTIJ, head_weights_BTI, rows, layer, pages_BM, first_BT, last_BT, k, window)
    keys_BSJ = rows.of_sequences(layer, pages_BM)

    def block(q_BTIJ: jax.Array, head_weights_BTI: jax.Array, first_BT: jax.Array, last_BT: jax.Array) -> jax.Array:
        return top_k(index_scores(q_BTIJ, head_weights_BTI, keys_BSJ), first_BT, last_BT, k)

    batch, _, heads, _ = q_BTIJ.shape
    per_query = 4 * batch * (heads + 4) * length
    return map_query_blocks(block, per_query, q_BTIJ, head_weights_BTI, first_BT, last_BT)


def _streamed(
    q_BTIJ: jax.Array,
    head_weights_BTI: jax.Array,
    rows: Rows,
    layer: Any,
    pages_BM: jax.Array | None,
    first_BT: jax.Array,
    last_BT: jax.Array,
    k: int,
    window: int,
) -> jax.Array:
    """The best so far, window by window; those kept stand before a window's own, so ties go to the lower position."""
    length = rows.capacity(pages_BM)

    def step(n: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(n * window, length - window)  # the last window may begin within the one before
        position_S = start + jnp.arange(window, dtype=jnp.int32)
        visible_BTS = (position_S >= jnp.maximum(first_BT, n * window)[..., None]) & (position_S <= last_BT[..., None])
        keys_BSJ = rows.window(layer, pages_BM, start, window)
        scores_BTS = comparable(index_scores(q_BTIJ, head_weights_BTI, keys_BSJ), visible_BTS)
        scores = jnp.concatenate([best[0], scores_BTS], axis=-1)
        positions = jnp.concatenate([best[1], jnp.where(visible_BTS, position_S, -1)], axis=-1)
        score_BTK, chosen_BTK = lax.top_k(scores, k)
        return score_BTK, jnp.take_along_axis(positions, chosen_BTK, axis=-1)

    windows = jnp.clip(jnp.max(last_BT) // window + 1, 0, -(-length // window))
    empty = (*first_BT.shape, k)
    nothing = (jnp.full(empty, -jnp.inf, jnp.float32), jnp.full(empty, -1, jnp.int32))
    return ascending(lax.fori_loop(0, windows, step, nothing)[1])


def index_scores(
    q_BTIJ: Float[Array, "B T I J"], head_weights_BTI: Float[Array, "B T I"], keys_BSJ: Float[Array, "B S J"]
) -> Float[Array, "B T S"]:
    """Sum over index heads of weight · relu(q · k · J^-0.5), float32; visibility is not applied."""
    dots_BTIS = einsum("BTIJ,BSJ->BTIS", q_BTIJ, keys_BSJ, out=jnp.float32)
    active_BTIS = jax.nn.relu(dots_BTIS * q_BTIJ.shape[-1] ** -0.5)
    return jnp.sum(active_BTIS * head_weights_BTI[..., None], axis=2)  # fused; as a product it would be many small ones
