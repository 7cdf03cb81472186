"""One einsum for model and ops: float32 operands are multiplied in full float32 on every backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def einsum(spec: str, *operands: jax.Array, out: Any = None) -> jax.Array:
    """`jnp.einsum` with float32 accumulation.

    Args:
        spec: letters of design's notation, e.g. ``"BTD,QD->BTQ"``.
        operands: arrays; float32 ones are not rounded to TF32 or bf16 on a GPU.
        out: dtype of the result; default that of the first operand.
    """
    full = any(x.dtype == jnp.float32 for x in operands)
    result = jnp.einsum(
        spec,
        *operands,
        precision=lax.Precision.HIGHEST if full else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    return result.astype(operands[0].dtype if out is None else out)
