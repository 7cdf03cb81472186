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

_BLOCK_BYTES = 64 << 20  # of the scores of a block of queries over the whole context, and of what they are compared by
_STRETCH = 16384  # keys that few queries choose from at a time
_FEW_WINDOW = 2048  # keys that few queries score at a time


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
        scores_BTS = _scores(q_BTIJ, head_weights_BTI, rows, layer, pages_BM, first_BT, last_BT, 0, length, WINDOW)
        visible_BTS = selection.visible(first_BT, last_BT, length)
        return method(comparable(scores_BTS, visible_BTS), visible_BTS, k)

    # A tile is a sixteenth of the block: it fits a core's cache.
    per_query = 16 * batch * max(4 * heads * WINDOW, length)
    return map_query_blocks(block, per_query, q_BTIJ, head_weights_BTI, first_BT, last_BT, budget=_BLOCK_BYTES)


def _scores(
    q_BTIJ: jax.Array,
    head_weights_BTI: jax.Array,
    rows: Rows,
    layer: Any,
    pages_BM: jax.Array | None,
    first_BT: jax.Array,
    last_BT: jax.Array,
    begin: Any,
    size: int,
    window: int,
) -> jax.Array:
    """Scores of positions begin … begin + size − 1, zero in windows that no query sees."""
    window = rows.window_size(pages_BM, min(window, size))

    def step(n: jax.Array, scores_BTS: jax.Array) -> jax.Array:
        start = window_start(n, window, size)
        keys_BSJ = rows.window(layer, pages_BM, begin + start, window)
        return lax.dynamic_update_slice_in_dim(scores_BTS, index_scores(q_BTIJ, head_weights_BTI, keys_BSJ), start, 2)

    lowest = jnp.clip(jnp.min(first_BT) - begin, 0, size) // window
    highest = jnp.minimum(jnp.max(last_BT) - begin, size - 1) // window + 1
    return lax.fori_loop(lowest, highest, step, jnp.zeros((*first_BT.shape, size), jnp.float32))


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
    """The best so far, stretch by stretch; those kept stand before a stretch's own, so ties go to the lower position."""
    length, size = rows.capacity(pages_BM), rows.window_size(pages_BM, _STRETCH)

    def scored(n: Any) -> tuple[jax.Array, jax.Array]:
        begin = window_start(n, size, length)
        position_S = begin + jnp.arange(size, dtype=jnp.int32)
        visible_BTS = (position_S >= jnp.maximum(first_BT, n * size)[..., None]) & (position_S <= last_BT[..., None])
        scores_BTS = _scores(
            q_BTIJ, head_weights_BTI, rows, layer, pages_BM, first_BT, last_BT, begin, size, _FEW_WINDOW
        )
        return comparable(scores_BTS, visible_BTS), jnp.where(visible_BTS, position_S, -1)

    if size == length:
        scores_BTS, position_BTS = scored(jnp.int32(0))
        return by_sorting(scores_BTS, position_BTS >= 0, k)

    def step(n: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores, positions = (jnp.concatenate(pair, axis=-1) for pair in zip(best, scored(n), strict=True))
        score_BTK, chosen_BTK = lax.top_k(scores, k)
        return score_BTK, jnp.take_along_axis(positions, chosen_BTK, axis=-1)

    stretches = jnp.clip(jnp.max(last_BT) // size + 1, 0, -(-length // size))
    empty = (*first_BT.shape, k)
    nothing = (jnp.full(empty, -jnp.inf, jnp.float32), jnp.full(empty, -1, jnp.int32))
    return ascending(lax.fori_loop(0, stretches, step, nothing)[1])


def index_scores(
    q_BTIJ: Float[Array, "B T I J"], head_weights_BTI: Float[Array, "B T I"], keys_BSJ: Float[Array, "B S J"]
) -> Float[Array, "B T S"]:
    """Sum over index heads of weight · relu(q · k · J^-0.5), float32; visibility is not applied."""
    scale = q_BTIJ.shape[-1] ** -0.5
    if q_BTIJ.shape[1] <= selection.FEW_QUERIES:  # the keys first: XLA on the CPU transposes the second operand
        dots_BSTI = einsum("BSJ,BTIJ->BSTI", keys_BSJ, q_BTIJ, out=jnp.float32)
        return einsum("BSTI,BTI->BTS", jax.nn.relu(dots_BSTI * scale), head_weights_BTI, out=jnp.float32)
    dots_BTIS = einsum("BTIJ,BSJ->BTIS", q_BTIJ, keys_BSJ, out=jnp.float32)
    return einsum("BTIS,BTI->BTS", jax.nn.relu(dots_BTIS * scale), head_weights_BTI, out=jnp.float32)
