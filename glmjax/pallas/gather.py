"""Single rows of an arena side by side, as the sparse attention kernel will need them in shared memory."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glmjax.pallas.rows import Rows


def reference(rows: Rows, layer: int | Int[Array, ""], slot_K: Int[Array, " K"]) -> Float[Array, "K C"]:
    """The rows of a layer at the given slots, in plain XLA; zeros where the slot is −1.

    What no slot names is not read, be it NaN: it may be another request's leavings in a recycled page.

    Args:
      rows: an arena of pages per layer.
      layer: whose pages; may be traced.
      slot_K: page · A + offset, or −1 for no row; 0 <= slot < G · A is not checked.
    """
    pages_1M = jnp.arange(rows.values_LGAC.shape[1], dtype=jnp.int32)[None]
    row_KC = rows.gather(layer, pages_1M, jnp.maximum(slot_K, 0)[None, None])[0, 0]
    return jnp.where(slot_K[:, None] >= 0, row_KC, 0)
