"""The lightning indexer's choice: score every visible position, keep the best (model-spec: Indexer)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from glmjax.pallas import selection
from glmjax.pallas.blocks import WINDOW, map_query_blocks, window_start
from glmjax.pallas.precision import einsum
from glmjax.pallas.rows import Rows
from glmjax.pallas.selection import Selection
from glmjax.pallas.top_k import ascending, by_bisection, by_sorting, comparable

_STREAMED = 4096  # keys that few queries score at a time


def select(
    q_BTIJ: Float[Array, "B T I J"],
    head_weights_BTI: Float[Array, "B T I"],
    rows: Rows,
    layer: Int[Array, ""] | int,
    pages_BM: Int[Array, "B M"] | None,
    first_BT: Int[Array, "B T"],
    last_BT: Int[Array, "B T"],
    k: int,
) -> Selection:
    """The k best visible rows of each query; all of them where no more are visible. Ties go to the lowest position.

    One op, so that the scores of a long context never exist as a whole: few queries (decode) pass over the keys and
    keep the best so far, many (prefill) are taken in blocks, and neither scores keys that nobody sees. Nothing is
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
        return selection.visible(first_BT, last_BT, length)
    q_BTIJ, head_weights_BTI, rows = lax.stop_gradient((q_BTIJ, head_weights_BTI, rows))
    batch, queries, heads, _ = q_BTIJ.shape
    if queries <= selection.FEW_QUERIES:
        return _streamed(q_BTIJ, head_weights_BTI, rows, layer, pages_BM, first_BT, last_BT, k)
    method = by_bisection if selection.prefers_mask(queries, length, k) else by_sorting

    def block(q_BTIJ: jax.Array, head_weights_BTI: jax.Array, first_BT: jax.Array, last_BT: jax.Array) -> jax.Array:
        scores_BTS = _scores(q_BTIJ, head_weights_BTI, rows, layer, pages_BM, first_BT, last_BT)
        visible_BTS = selection.visible(first_BT, last_BT, length)
        return method(comparable(scores_BTS, visible_BTS), visible_BTS, k)

    per_query = 4 * batch * (heads * WINDOW + 4 * length)
    return map_query_blocks(block, per_query, q_BTIJ, head_weights_BTI, first_BT, last_BT)


def _scores(
    q_BTIJ: jax.Array,
    head_weights_BTI: jax.Array,
    rows: Rows,
    layer: Any,
    pages_BM: jax.Array | None,
    first_BT: jax.Array,
    last_BT: jax.Array,
) -> jax.Array:
    """Scores [B, T, S], zero in windows that no query sees."""
    length, window = rows.capacity(pages_BM), rows.window_size(pages_BM, WINDOW)

    def step(n: jax.Array, scores_BTS: jax.Array) -> jax.Array:
        start = window_start(n, window, length)
        keys_BSJ = rows.window(layer, pages_BM, start, window)
        return lax.dynamic_update_slice_in_dim(scores_BTS, index_scores(q_BTIJ, head_weights_BTI, keys_BSJ), start, 2)

    begin = jnp.clip(jnp.min(first_BT), 0, length) // window
    end = jnp.minimum(jnp.max(last_BT), length - 1) // window + 1
    return lax.fori_loop(begin, end, step, jnp.zeros((*first_BT.shape, length), jnp.float32))


def _streamed(
    q_BTIJ: jax.Array,
    head_weights_BTI: jax.Array,
    rows: Rows,
    layer: Any,
    pages_BM: jax.Array | None,
    first_BT: jax.Array,
    last_BT: jax.Array,
    k: int,
) -> jax.Array:
    """The best so far, window by window; those kept stand before a window's own, so ties go to the lower position."""
    length, window = rows.capacity(pages_BM), rows.window_size(pages_BM, _STREAMED)

    def scored(n: Any) -> tuple[jax.Array, jax.Array]:
        start = window_start(n, window, length)
        position_S = start + jnp.arange(window, dtype=jnp.int32)
        visible_BTS = (position_S >= jnp.maximum(first_BT, n * window)[..., None]) & (position_S <= last_BT[..., None])
        keys_BSJ = rows.window(layer, pages_BM, start, window)
        scores_BTS = comparable(index_scores(q_BTIJ, head_weights_BTI, keys_BSJ), visible_BTS)
        return scores_BTS, jnp.where(visible_BTS, position_S, -1)

    if window == length:
        scores_BTS, position_BTS = scored(jnp.int32(0))
        return by_sorting(scores_BTS, position_BTS >= 0, k)

    def step(n: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, positions = (jnp.concatenate(pair, axis=-1) for pair in zip(best, scored(n), strict=True))
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
