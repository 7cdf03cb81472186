"""A linear map by one layer's matrix of a stack: every projection of the model but the experts'."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glmjax.pallas.precision import einsum
from glmjax.pallas.stack import Stack


def project(spec: str, x: jax.Array, weight: Stack, layer: Any, out: Any = None) -> jax.Array:
    """`einsum` of x with the layer's matrix.

    The slice is tied to x by a barrier: otherwise XLA lifts the slices of several layers to the front of a program and
    copies them there. Matrices whose rows or columns are several letters are multiplied as two-dimensional ones, which
    CPU and GPU have fast code for.

    Args:
        spec: for a single layer, e.g. ``"BTQ,NYQ->BTNY"``: x's letters, the matrix's letters (outputs, then inputs, or
            with a batch letter in front that both share, e.g. ``"BTNH,NHR->BTNR"``), the result's.
        x: the input.
        weight: stack of the layers' matrices, plain or FP8.
        layer: index into the stack, an int or traced.
        out: dtype of the result; default x's.
    """
    x, layer = lax.optimization_barrier((x, jnp.asarray(layer, jnp.int32)))
    matrix = weight.at(layer, dtype=x.dtype)
    inputs, letters, outputs = spec.replace("->", ",").split(",")
    contracted = [a for a in letters if a not in outputs]
    if any(a in inputs and a in outputs for a in letters):
        # The matrix first: XLA on the CPU has no bf16 × bf16 = f32 for the layout that "BTNH,NHR->BTNR" becomes.
        return einsum(f"{letters},{inputs}->{outputs}", matrix, x, out=out)
    width = math.prod(matrix.shape[letters.index(a)] for a in contracted)
    rows = matrix.shape[: len(letters) - len(contracted)]
    leading = x.shape[: len(inputs) - len(contracted)]
    flat = einsum("MD,ND->MN", x.reshape(math.prod(leading), width), matrix.reshape(math.prod(rows), width), out=out)
    return flat.reshape(*leading, *rows)
