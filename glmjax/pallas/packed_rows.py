"""FP8 rows: what a cached row is stored as where a byte a number has to do.

A row is bytes: its numbers as e4m3, then the float32 scales of each tile of 128, then the last numbers (a latent's
rotary part, which positions depend on) as bfloat16. For GLM-5 that is 512 + 16 + 128 = 656 bytes of a latent row instead
of 1152, and 128 + 4 of an index key, the layout of FlashMLA. The arena is of `uint8`: XLA on the CPU would convert a whole
arena of e4m3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TILE = 128
"""Numbers with a scale in common."""

_E4M3 = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(_E4M3).max)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """How rows are packed.

    Attributes:
        width: C, numbers of a row.
        exact: of these, how many at the end are kept as bfloat16.
        dtype: of rows when they are read.
    """

    width: int
    exact: int
    dtype: Any

    @property
    def bytes(self) -> int:
        """Of a row."""
        return self._quantised + 4 * self._tiles + 2 * self.exact

    def pack(self, rows: jax.Array) -> jax.Array:
        """Numbers [..., C] to bytes [..., bytes]. NaN stays NaN."""
        rows = rows.astype(jnp.float32)
        numbers, exact = rows[..., : self._quantised], rows[..., self._quantised :]
        padded = jnp.pad(numbers, [(0, 0)] * (rows.ndim - 1) + [(0, self._tiles * TILE - self._quantised)])
        tiles = padded.reshape(*rows.shape[:-1], self._tiles, TILE)
        largest = jnp.max(jnp.abs(tiles), axis=-1, keepdims=True)
        scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
        small = (tiles / scale).astype(_E4M3).reshape(padded.shape)[..., : self._quantised]
        parts = small, scale[..., 0], exact.astype(jnp.bfloat16)
        return jnp.concatenate([_bytes(part) for part in parts], axis=-1)

    def unpack(self, stored: jax.Array) -> jax.Array:
        """Bytes to numbers in `dtype`."""
        ends = self._quantised, self._quantised + 4 * self._tiles
        small, scale, exact = jnp.split(stored, ends, axis=-1)
        scale = lax.bitcast_convert_type(scale.reshape(*scale.shape[:-1], self._tiles, 4), jnp.float32)
        scale = jnp.repeat(scale, TILE, axis=-1)[..., : self._quantised]
        numbers = lax.bitcast_convert_type(small, _E4M3).astype(jnp.float32) * scale
        exact = lax.bitcast_convert_type(exact.reshape(*exact.shape[:-1], self.exact, 2), jnp.bfloat16)
        return jnp.concatenate([numbers.astype(self.dtype), exact.astype(self.dtype)], axis=-1)

    @property
    def _quantised(self) -> int:
        return self.width - self.exact

    @property
    def _tiles(self) -> int:
        return -(-self._quantised // TILE)


def _bytes(array: jax.Array) -> jax.Array:
    found = lax.bitcast_convert_type(array, jnp.uint8)
    return found if found.ndim == array.ndim else found.reshape(*array.shape[:-1], -1)
