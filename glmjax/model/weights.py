"""Declaring weights: letters, sizes and a kind are all that shape, sharding, initialisation and storage follow from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.pallas.stack import Stack


def random_source(seed: int) -> nnx.Rngs:
    """Where initial weights come from: the generator that compiles fastest, as there is a program per shape."""
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))


class Weight(nnx.Module):
    """One array of weights, usually stacked over layers, with its scales where it is stored as FP8.

    Attributes:
        letters: one letter per dimension (docs/architecture.md, Notation); also the logical axes for sharding.
        columns: how many of the last letters are the columns of the checkpoint's matrix; 0 for a vector.
        block: elements per scale along each dimension, or () where it is not quantised.
        values: the array; uint8 holding e4m3fn bits where quantised.
        scale: float32, every dimension divided by its block (rounded up); None where not quantised.
    """

    def __init__(
        self,
        letters: str,
        columns: int,
        values: jax.Array,
        block: tuple[int, ...] = (),
        scale: jax.Array | None = None,
    ):
        self.letters = letters
        self.columns = columns
        self.block = block
        self.values = nnx.Param(values)
        self.scale = None if scale is None else nnx.Param(scale)

    @property
    def array(self) -> Any:
        """The values as a plain array; a `jax.ShapeDtypeStruct` in an abstract model."""
        return self.values.get_value()

    @property
    def scales(self) -> Any:
        """The scales as a plain array, or None."""
        return None if self.scale is None else self.scale.get_value()

    @property
    def stack(self) -> Stack:
        """What ops take."""
        return Stack(self.array, self.scales, self.block)

    def at(self, *index: Any, dtype: Any = None) -> jax.Array:
        """The entry of a layer (or layer and expert), dequantised; see `Stack.at`."""
        return self.stack.at(*index, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Declare:
    """Makes the weights of a model: real ones with ``rngs``, abstract ones under `nnx.eval_shape`.

    Attributes:
        sizes: length of every letter.
        dtype: of matrices and norms that are not quantised.
        rngs: source of random initial values.
        fp8_block: rows and columns per scale of the matrices kept as FP8, or None to keep none.
    """

    sizes: Mapping[str, int]
    dtype: Any
    rngs: nnx.Rngs
    fp8_block: tuple[int, int] | None = None

    def sized(self, **sizes: int) -> Declare:
        """The same with other lengths for some letters."""
        return dataclasses.replace(self, sizes={**self.sizes, **sizes})

    def shape(self, letters: str) -> tuple[int, ...]:
        """Lengths of the letters; a digit is its own length."""
        return tuple(int(a) if a.isdigit() else self.sizes[a] for a in letters)

    def norm(self, letters: str) -> Weight:
        """A norm's factor, one at first."""
        return Weight(letters, 0, jnp.ones(self.shape(letters), self.dtype))

    def bias(self, letters: str, dtype: Any = None) -> Weight:
        """An offset, zero at first."""
        return Weight(letters, 0, jnp.zeros(self.shape(letters), dtype or self.dtype))

    def plain(self, letters: str, columns: str, gain: float = 1.0) -> Weight:
        """A matrix that is never quantised; normal at first.

        Args:
            letters: its dimensions.
            columns: the last of them, over which a product sums.
            gain: its initial standard deviation is gain · (length of columns)^-0.5.
        """
        deviation = gain * math.prod(self.shape(columns)) ** -0.5
        return Weight(letters, len(columns), self._normal(letters, self.dtype) * jnp.asarray(deviation, self.dtype))

    def matrix(self, letters: str, rows: str, columns: str, gain: float = 1.0, row_step: int = 0) -> Weight:
        """A matrix [rows, columns] of the checkpoint, kept as FP8 if the model keeps FP8.

        Args:
            letters: its dimensions here, e.g. ``LNYQ``.
            rows: the letters the checkpoint's rows are made of, e.g. ``NY``.
            columns: likewise; the fan-in.
            gain: factor on the initial standard deviation.
            row_step: a multiple of which every slice of the rows starts and ends at, where the array holds only some
                of the checkpoint's rows; the blocks of scales are cut at it.
        """
        if self.fp8_block is None:
            return self.plain(letters, columns, gain)
        widths = dict(_block_widths(rows, self, self.fp8_block[0], row_step))
        widths |= dict(_block_widths(columns, self, self.fp8_block[1], 0))
        block = tuple(widths.get(letter, 1) for letter in letters)
        shape = self.shape(letters)
        bits = jax.lax.bitcast_convert_type(self._normal(letters, jnp.float32).astype(jnp.float8_e4m3fn), jnp.uint8)
        scale = jnp.full([-(-n // b) for n, b in zip(shape, block, strict=True)], 1.0, jnp.float32)
        return Weight(letters, len(columns), bits, block, scale * gain * math.prod(self.shape(columns)) ** -0.5)

    def _normal(self, letters: str, dtype: Any) -> jax.Array:
        return jax.random.normal(self.rngs.params(), self.shape(letters), dtype)


def _block_widths(letters: str, declare: Declare, block: int, step: int) -> list[tuple[str, int]]:
    """Elements per scale along each letter of a flattened axis whose blocks are ``block`` wide.

    Only the last letter is contiguous; where its length is no multiple of the block, block boundaries fall inside it at
    multiples of the greatest common divisor, at which the scales are repeated: the same numbers, cut finer.
    """
    *outer, last = letters
    if outer or step:
        block = math.gcd(block, step or declare.sizes[last])
    return [(letter, 1) for letter in outer] + [(last, block)]
