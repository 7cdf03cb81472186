"""Work in blocks of queries and windows of rows, so that memory does not grow with the product of queries and context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_BYTES = 4 << 20  # of intermediates that one block of queries may hold: about what a core's cache does
WINDOW = 256  # rows of a sequence that are looked at together


def block_size(length: int, bytes_per_query: int, budget: int | None = None) -> int:
    """Queries of a block: a power of two, or all of them.

    Args:
        length: queries there are.
        bytes_per_query: what is materialised for one position of the query axis, over the whole batch.
        budget: bytes that a block may hold; default `BLOCK_BYTES`.
    """
    return min(length, 1 << (max(1, (budget or BLOCK_BYTES) // bytes_per_query).bit_length() - 1))


def split(queries_BT: Any, size: int) -> Any:
    """Arrays [B, T, …] of a pytree as [blocks, B, size, …]; the last block is filled up with zeros."""

    def one(x_BT: jax.Array) -> jax.Array:
        blocks = -(-x_BT.shape[1] // size)
        x_BT = jnp.pad(x_BT, [(0, 0), (0, blocks * size - x_BT.shape[1])] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], blocks, size, *x_BT.shape[2:]), 1, 0)

    return jax.tree.map(one, queries_BT)


def join(blocks: Any, length: int) -> Any:
    """The inverse of `split`."""

    def one(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(one, blocks)


def map_query_blocks(
    f: Callable[..., Any], bytes_per_query: int, *queries_BT: jax.Array, budget: int | None = None
) -> Any:
    """Apply f to blocks of the query axis (axis 1); f is recomputed where gradients are taken.

    Args:
        f: from blocks [B, t, …] to a pytree of arrays [B, t, …]; rows must not depend on each other. Queries that fill
            up the last block are zeros.
        bytes_per_query: see `block_size`.
        queries_BT: arrays that share axes B and T.
        budget: see `block_size`.
    """
    length = queries_BT[0].shape[1]
    size = block_size(length, bytes_per_query, budget)
    if length == size:
        return f(*queries_BT)
    return join(lax.map(jax.checkpoint(lambda block: f(*block)), split(queries_BT, size)), length)


def window_start(n: jax.Array, window: int, length: int) -> jax.Array:
    """Where window n begins; the last one ends at `length` and may begin within the one before."""
    return jnp.minimum(n * window, length - window)
