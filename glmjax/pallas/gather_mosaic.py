"""Rows gathered on Hopper: every thread copies 16 bytes at a time into a swizzled tile, as wgmma reads it.

Hopper's copy engine cannot gather rows, so `cp.async` does. The kernel here takes the tile back out by the copy engine,
which undoes the swizzle: what it returns is right only if address and swizzle are. Nothing dispatches to it: it is the
building block of a sparse attention kernel, to be proven first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm
from jaxtyping import Array, Float, Int

from glmjax.pallas.aot import SHARED_MEMORY, Check, Limits
from glmjax.pallas.gather import reference
from glmjax.pallas.rows import Rows

BLOCK = 64
"""Rows of a tile."""

SWIZZLE = 128
"""Bytes after which the swizzle's pattern moves on: a row of an 8-row tile, the widest that wgmma knows."""

TILED = (plgpu.TilingTransform((8, SWIZZLE // 2)), plgpu.SwizzleTransform(SWIZZLE))
"""How a tile [BLOCK, C] of a two-byte dtype lies in shared memory."""

_COPY_BYTES = 16  # per thread and instruction, the most there is


def supports(rows: Rows, layer: int | Int[Array, ""], slot_K: Int[Array, " K"]) -> bool:
    """Whether the kernel takes these shapes and dtypes: bfloat16, whole tiles, row numbers of 32 bits."""
    del layer
    values = rows.values_LGAC
    tile_bytes, whole = BLOCK * rows.row_bytes, SWIZZLE // values.dtype.itemsize
    return (
        values.dtype == jnp.bfloat16
        and rows.width % whole == 0
        and tile_bytes < SHARED_MEMORY - 1024  # room for alignment
        and slot_K.size % BLOCK == 0
        and slot_K.size > 0
        and values.size // rows.width < 2**31
    )


def mosaic(
    rows: Rows,
    layer: int | Int[Array, ""],
    slot_K: Int[Array, " K"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "K C"]:
    """`gather.reference` as one kernel, for arguments that it `supports`: a warpgroup per tile of `BLOCK` rows.

    Args:
      rows: an arena of pages per layer; the kernel reads what the slots name and nothing else.
      layer: whose pages.
      slot_K: page · A + offset, or −1 for a row of zeros.
      interpret: run on the CPU, for tests; then rows are copied one by one and nothing is swizzled.
    """
    layers, pages, page_size, width = rows.values_LGAC.shape
    slot_K = slot_K.astype(jnp.int32)
    row_K = jnp.where(slot_K < 0, -1, jnp.asarray(layer, jnp.int32) * (pages * page_size) + slot_K)

    def gather(arena_SC, row_K, out_KC, tile_KC):
        here = pl.ds(lax.axis_index("block") * BLOCK, BLOCK)
        if interpret is None:
            copy_rows(arena_SC, row_K.at[here], tile_KC)
            await_rows()
        else:
            for k in range(BLOCK):
                row = row_K[here.start + k]
                tile_KC[k] = jnp.where(row < 0, 0, arena_SC[jnp.maximum(row, 0)])
        plgpu.commit_smem()  # the copy engine reads what threads have written
        plgpu.copy_smem_to_gmem(tile_KC, out_KC.at[here])
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        gather,
        out_type=jax.ShapeDtypeStruct((slot_K.size, width), rows.values_LGAC.dtype),
        scratch_types=[
            plgpu.SMEM((BLOCK, width), rows.values_LGAC.dtype, transforms=TILED if interpret is None else ())
        ],
        grid=(slot_K.size // BLOCK,),
        grid_names=("block",),
        interpret=interpret,
    )
    return kernel(rows.values_LGAC.reshape(layers * pages * page_size, width), row_K)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(TILED)))
def copy_rows(ctx, arena_SC, row_K, tile_KC):
    """Start copying rows of an arena in global memory into a tile in shared memory; one warpgroup calls it.

    Eight neighbouring threads copy 128 contiguous bytes of a row. Where the swizzle puts them is Mosaic's to say.

    Args:
      ctx: of the launch.
      arena_SC: all rows.
      row_K: as many row numbers as the tile has rows; −1 fills a row with zeros and reads nothing.
      tile_KC: the tile, laid out as `TILED`.
    """
    del ctx
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    down, across, tile_rows, tile_columns = tile_KC.type.shape
    width = across * tile_columns
    layout = fragmented_array.tiled_copy_smem_gmem_layout(down, across, SWIZZLE, 16)

    def of_thread(strides: tuple[int, int]) -> ir.Value:
        """The thread's place in the tile, measured along the given strides of row and column."""
        tiled = [arith.constant(i32, s) for s in layout.tiling.tile_strides(strides)[2:]]
        parts = [utils.dyn_dot(place, tiled) for place in (layout.lane_indices(), layout.warp_indices())]
        return arith.addi(*parts)

    first_row, first_column = of_thread((1, 0)), of_thread((0, 1))
    global_memory = llvm.PointerType.get(address_space=1)
    arena = llvm.addrspacecast(global_memory, utils.memref_ptr(arena_SC))

    @functools.cache
    def row_at(k: int) -> tuple[ir.Value, ir.Value]:
        """The first of a row's elements that the thread copies, and how many bytes it copies at a time: none of −1."""
        place = arith.index_cast(ir.IndexType.get(), arith.addi(first_row, utils.c(k, i32)))
        row = memref.load(row_K, [place])
        exists = arith.cmpi(arith.CmpIPredicate.sge, row, utils.c(0, i32))
        element = arith.muli(arith.extsi(i64, arith.maxsi(row, utils.c(0, i32))), utils.c(width, i64))
        element = arith.addi(element, arith.extui(i64, first_column))
        return element, arith.select(exists, utils.c(_COPY_BYTES, i32), utils.c(0, i32))

    shape = (down * tile_rows, width)
    for _, _, place, target in fragmented_array.FragmentedArray.transfer_tiled(
        tile_KC, SWIZZLE, layout, shape, optimized=False
    ):
        k, column = place()
        element, size = row_at(k)
        source = utils.getelementptr(arena, [arith.addi(element, utils.c(column, i64))], tile_KC.type.element_type)
        nvvm.cp_async_shared_global(target, source, _COPY_BYTES, nvvm.LoadCacheModifierKind.CG, cp_size=size)
    nvvm.cp_async_commit_group()


@plgpu.inline_mgpu()
def await_rows(ctx):
    """Wait until the copies that the calling threads started have landed."""
    del ctx
    nvvm.cp_async_wait_group(0)


def checks() -> list[Check]:
    """A selection of GLM-5.1 out of latent rows and out of index keys: one launch beside the row numbers, no copy."""

    def avals(width: int, slots: int) -> tuple[Rows, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        arena = jax.ShapeDtypeStruct((78, 512, 64, width), jnp.bfloat16)
        return Rows(arena), jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((slots,), jnp.int32)

    limits = Limits(registers=64, temporary_bytes=64 << 10)
    shapes = ((576, 2048), (128, 64))
    return [Check(f"gather C={C} K={K}", mosaic, avals(C, K), limits, mosaic=("gather",)) for C, K in shapes] + [
        Check(f"gather reference C={C} K={K}", reference, avals(C, K)) for C, K in shapes[:1]
    ]
