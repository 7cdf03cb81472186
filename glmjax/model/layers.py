"""Small pieces every block uses: rotary positions, the index keys' LayerNorm, SwiGLU."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from glmjax.pallas.project import project
from glmjax.pallas.stack import Stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Cosines and sines of the rotary angles, float32 [B, T, P/2]."""

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def at(cls, positions_BT: Int[Array, "B T"], width: int, theta: float) -> Rope:
        """The tables for positions; angle_j = position · theta^(−2j/P), all in float32.

        Args:
            positions_BT: token positions.
            width: P.
            theta: rope_theta.
        """
        inverse = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles = positions_BT.astype(jnp.float32)[..., None] * inverse
        return cls(jnp.cos(angles), jnp.sin(angles))

    def rotate(self, x: Float[Array, "B T *heads P"]) -> Float[Array, "B T *heads P"]:
        """Rotate interleaved pairs (x[2j], x[2j+1]); the output has the evens first, then the odds."""
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        between = (1,) * (x.ndim - 3)
        cos, sin = (t.reshape(*t.shape[:2], *between, t.shape[-1]) for t in (self.cos, self.sin))
        return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-1).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*rows J"], weight_J: Float[Array, "J"], bias_J: Float[Array, "J"], eps: float
) -> Float[Array, "*rows J"]:
    """LayerNorm in float32, cast back to x's dtype at the end (the indexer's k_norm)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight_J.astype(jnp.float32) + bias_J.astype(jnp.float32)).astype(x.dtype)


def swiglu(x_BTD: Float[Array, "B T D"], gate_up_L2FD: Stack, down_LDF: Stack, layer: Any) -> Float[Array, "B T D"]:
    """W_down(silu(W_gate x) · W_up x)."""
    gate_up_BT2F = project("BTD,zFD->BTzF", x_BTD, gate_up_L2FD, layer)
    return project("BTF,DF->BTD", jax.nn.silu(gate_up_BT2F[:, :, 0]) * gate_up_BT2F[:, :, 1], down_LDF, layer)
