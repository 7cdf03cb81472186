"""Work in blocks of queries, so that memory does not grow with the product of queries and context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_BYTES = 32 << 20  # of intermediates that one block of queries may hold


def map_query_blocks(f: Callable[..., Any], bytes_per_query: int, *queries_BT: jax.Array) -> Any:
    """Apply f to blocks of the query axis (axis 1); f is recomputed where gradients are taken.

    Args:
        f: from blocks [B, t, …] to a pytree of arrays [B, t, …]; rows must not depend on each other.
        bytes_per_query: what f materialises for one position of the query axis, over the whole batch.
        queries_BT: arrays that share axes B and T.
    """
    length = queries_BT[0].shape[1]
    size = 1 << (max(1, BLOCK_BYTES // bytes_per_query).bit_length() - 1)
    if length <= size:
        return f(*queries_BT)
    blocks = -(-length // size)
    padded = [jnp.pad(x, [(0, 0), (0, blocks * size - length)] + [(0, 0)] * (x.ndim - 2)) for x in queries_BT]
    split = [jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0) for x in padded]
    out = lax.map(jax.checkpoint(lambda block: f(*block)), split)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], blocks * size, *x.shape[3:])[:, :length]

    return jax.tree.map(join, out)
