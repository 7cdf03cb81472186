"""A stack of equal arrays, one per layer, of which an op reads one entry: plain, or FP8 with scales per block."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """Weights of all layers that have them, sliced where they are used.

    Ops take the whole stack and a layer index, never a slice: a Mosaic kernel addresses the entry itself, and XLA fuses
    the slice into its consumer instead of copying a layer.

    Attributes:
        values: [L, …] in the weights' dtype, or uint8 that holds e4m3fn bits (XLA on CPU would convert a whole stack of
            float8 at the program's entry; it cannot see through the bit-cast that follows the slice).
        scale: [L, …] float32 with every dimension divided by its block (rounded up), or None for plain values.
        block: elements per scale along each dimension of ``values``; () for plain values.
    """

    values: Any
    scale: Any = None
    block: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def at(self, *index: Any, dtype: Any = None) -> jax.Array:
        """The entry at leading indices (layer, or layer and expert), dequantised.

        Args:
            index: integers or traced int32 scalars, within bounds (out-of-range ones are clamped).
            dtype: of the result; default that of the values, float32 for FP8.
        """
        values = take(self.values, *index)
        if self.scale is None:
            return values if dtype is None else values.astype(dtype)
        shape, block = self.values.shape, self.block
        if len(block) != len(shape) or self.scale.shape != tuple(-(-n // b) for n, b in zip(shape, block, strict=True)):
            raise ValueError(f"scale {self.scale.shape} does not cover values {shape} in blocks {block}")
        scale = take(self.scale, *index)
        for axis, width in enumerate(block[len(index) :]):
            if width > 1:
                scale = jnp.repeat(scale, width, axis=axis, total_repeat_length=scale.shape[axis] * width)
                scale = lax.slice_in_dim(scale, 0, values.shape[axis], axis=axis)
        quantised = lax.bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.float32)
        return (quantised * scale).astype(jnp.float32 if dtype is None else dtype)


def take(stack: jax.Array, *index: Any) -> jax.Array:
    """``stack[index]`` for leading indices, as one dynamic slice (no gather, no wrap-around of negative indices)."""
    rank = stack.ndim - len(index)
    starts = [jnp.asarray(i, jnp.uint32) for i in index] + [jnp.uint32(0)] * rank
    sizes = (1,) * len(index) + stack.shape[len(index) :]
    return lax.dynamic_slice(stack, starts, sizes).reshape(stack.shape[len(index) :])
