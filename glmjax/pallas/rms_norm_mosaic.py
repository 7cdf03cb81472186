"""RMS normalisation on Hopper: one row per thread block, held in the registers of one warpgroup."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from glmjax.pallas.aot import Check, Limits
from glmjax.pallas.rms_norm import reference, rms_norm

THREADS = 128
"""Threads of a warpgroup; each holds D / 128 elements of the row."""

WIDEST = 12288
"""Widest row that was compiled without a spill, in float32 (214 registers a thread)."""


def supports(
    x: Float[Array, "*rows D"], weight_LD: Float[Array, "L D"], layer: int | Int[Array, ""], *, eps: float
) -> bool:
    """Whether the kernel takes these shapes and dtypes: whole warpgroups of bfloat16 or float32, at least one row."""
    D = x.shape[-1]
    return x.dtype in (jnp.bfloat16, jnp.float32) and D % THREADS == 0 and D <= WIDEST and 0 < x.size < 2**31


def mosaic(
    x: Float[Array, "*rows D"],
    weight_LD: Float[Array, "L D"],
    layer: int | Int[Array, ""],
    *,
    eps: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "*rows D"]:
    """`rms_norm.rms_norm` as one kernel, for arguments that it `supports`. It has no gradient.

    The row and its weights are loaded at once, straight into registers, in the widest vectors that divide a thread's
    share of the row; the sum of squares is the only exchange between threads.

    Args:
      x: rows.
      weight_LD: the whole stack; the kernel reads one row of it.
      layer: which one; an operand of the kernel, so that a loop's counter needs no copy and no recompilation.
      eps: added to the mean square.
      interpret: run on the CPU, for tests.
    """
    D = x.shape[-1]
    share = D // THREADS
    vector = min(share & -share, 16 // x.dtype.itemsize)
    layout = plgpu.Layout.WG_STRIDED((D,), vec_size=vector)

    def body(x_TD, weight_LD, layer_1, y_TD):
        row = lax.axis_index("row")
        weight_D = plgpu.load(weight_LD.at[layer_1[0]], layout=layout)
        x_D = plgpu.load(x_TD.at[row], layout=layout).astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(x_D * x_D) / D + eps)
        y_TD[row] = (x_D * scale).astype(y_TD.dtype) * weight_D

    x_TD = x.reshape(-1, D)
    body.__name__ = "rms_norm"  # which names the kernel
    kernel = plgpu.kernel(
        body,
        out_type=jax.typeof(x_TD),  # with the axes of shard_map that it varies over
        grid=x_TD.shape[:1],
        grid_names=("row",),
        interpret=interpret,
    )
    return kernel(x_TD, weight_LD, jnp.asarray(layer, jnp.int32).reshape(1)).reshape(x.shape)


def checks() -> list[Check]:
    """At the widths of GLM-5.1 (model, query and latent norms): one launch without temporaries; XLA's beside it."""

    def avals(T: int, D: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        shapes = ((T, D), jnp.bfloat16), ((78, D), jnp.bfloat16), ((), jnp.int32)
        return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)

    limits = Limits(registers=96, temporary_bytes=0)
    shapes = ((1, 6144), (16, 6144), (512, 6144), (16, 2048), (16, 512))
    return [
        Check(f"rms_norm T={T} D={D}", partial(rms_norm, eps=1e-5), avals(T, D), limits, mosaic=("rms_norm",))
        for T, D in shapes
    ] + [Check(f"rms_norm reference T={T} D={D}", partial(reference, eps=1e-5), avals(T, D)) for T, D in shapes[:3]]
