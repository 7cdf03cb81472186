"""The lightning indexer's choice: score every visible position, keep the best (model-spec: Indexer)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from glmjax.pallas import selection
from glmjax.pallas.blocks import WINDOW, map_query_blocks, window_start
from glmjax.pallas.precision import einsum
from glmjax.pallas.rows import Rows
from glmjax.pallas.selection import Selection
from glmjax.pallas.top_k import ascending, by_bisection, by_placing, by_sorting, comparable

_BLOCK_BYTES = 64 << 20  # of the scores of a block of queries over the whole context, and of what they are compared by
_STRETCH = 32768  # keys that few queries choose from at a time
_PLACED_RATIO = 24  # up to so many times the chosen keys, bisection beats sorting, which is done row by row
_SHORTEST_WINDOW, _LONGEST_WINDOW = 1024, 8192  # half the context between, for few queries


class _Queries(NamedTuple):
    """Who chooses: index queries, their heads' weights, and the first and last position each of them sees."""

    q_BTIJ: jax.Array
    head_weights_BTI: jax.Array
    first_BT: jax.Array
    last_BT: jax.Array


class _Keys(NamedTuple):
    """From what: the rows of a layer, in each sequence's pages."""

    rows: Rows
    layer: jax.Array | int
    pages_BM: jax.Array | None

    @property
    def length(self) -> int:
        return self.rows.capacity(self.pages_BM)


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
    keys = _Keys(rows, layer, pages_BM)
    if k >= keys.length:
        return selection.visible(first_BT, last_BT, keys.length)
    queries, keys = lax.stop_gradient((_Queries(q_BTIJ, head_weights_BTI, first_BT, last_BT), keys))
    batch, count, heads, _ = q_BTIJ.shape
    if count <= selection.FEW_QUERIES:
        return _streamed(queries, keys, k)
    method = by_bisection if selection.prefers_mask(count, keys.length, k) else by_sorting

    def block(*queries: jax.Array) -> jax.Array:
        return method(_scores(_Queries(*queries), keys, 0, keys.length, WINDOW), k)

    # A tile is a sixteenth of the block: it fits a core's cache.
    per_query = 16 * batch * max(4 * heads * WINDOW, keys.length)
    return map_query_blocks(block, per_query, *queries, budget=_BLOCK_BYTES)


def _scores(queries: _Queries, keys: _Keys, begin: Any, size: int, window: int) -> jax.Array:
    """Comparable scores [B, T, size] of the positions from begin on; windows that no query sees are not computed."""
    rows, layer, pages_BM = keys
    window = rows.window_size(pages_BM, min(window, size))
    first_BT, last_BT = queries.first_BT - begin, queries.last_BT - begin

    def step(n: jax.Array, scores_BTS: jax.Array) -> jax.Array:
        start = window_start(n, window, size)
        keys_BSJ = rows.window(layer, pages_BM, begin + start, window)
        window_BTS = index_scores(queries.q_BTIJ, queries.head_weights_BTI, keys_BSJ)
        return lax.dynamic_update_slice_in_dim(scores_BTS, window_BTS, start, 2)

    lowest = jnp.clip(jnp.min(first_BT), 0, size) // window
    highest = jnp.minimum(jnp.max(last_BT), size - 1) // window + 1
    scores_BTS = lax.fori_loop(lowest, highest, step, jnp.zeros((*first_BT.shape, size), jnp.float32))
    return comparable(scores_BTS, selection.visible(first_BT, last_BT, size))


def _streamed(queries: _Queries, keys: _Keys, k: int) -> jax.Array:
    """The best so far, stretch by stretch; those kept stand before a stretch's own, so ties go to the lower position."""
    size = keys.rows.window_size(keys.pages_BM, _STRETCH)
    window = min(max(keys.length // 2, _SHORTEST_WINDOW), _LONGEST_WINDOW)
    if size == keys.length:
        method = by_placing if size <= _PLACED_RATIO * k else by_sorting
        return method(_scores(queries, keys, 0, size, window), k)

    def step(n: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        score_BTK, position_BTK = best
        begin = window_start(n, size, keys.length)  # the last stretch begins within the one before
        unseen = queries._replace(first_BT=jnp.maximum(queries.first_BT, n * size))
        score_BTS = jnp.concatenate([score_BTK, _scores(unseen, keys, begin, size, window)], axis=-1)
        score_BTK, chosen_BTK = lax.top_k(score_BTS, k)
        kept_BTK = jnp.take_along_axis(position_BTK, jnp.minimum(chosen_BTK, k - 1), axis=-1)
        return score_BTK, jnp.where(chosen_BTK < k, kept_BTK, begin + chosen_BTK - k)

    stretches = jnp.clip(jnp.max(queries.last_BT) // size + 1, 0, -(-keys.length // size))
    none_BTK = jnp.full((*queries.first_BT.shape, k), -jnp.inf, jnp.float32)
    return ascending(*lax.fori_loop(0, stretches, step, (none_BTK, jnp.zeros_like(none_BTK, jnp.int32))))


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
