"""The chosen experts of a mixture, and no others: grouped SwiGLU products (model-spec: Experts)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from glmjax.pallas.precision import einsum
from glmjax.pallas.stack import Stack, take

_MOST_ROWS = 512  # rows of one block; larger ones gain nothing and pad more
_FEW_ROWS = 16  # in smaller blocks, padding costs less than reading an expert for a second one


def experts(
    x_MD: Float[Array, "M D"],
    gate_up_LE2FD: Stack,
    down_LEDF: Stack,
    layer: Int[Array, ""],
    choice_MX: Int[Array, "M X"],
    weight_MX: Float[Array, "M X"],
) -> Float[Array, "M D"]:
    """Σ_x weight · W_down(silu(W_gate x) · W_up x) over each token's chosen experts, summed in float32.

    Pairs (token, expert) are sorted by expert, every expert's group is padded to whole blocks, and a loop runs over the
    blocks that exist: one token costs X matrix-vector products, thousands cost dense products of many rows, and an
    expert that nobody chose is not read.

    Args:
        x_MD: tokens.
        gate_up_LE2FD: gate (0) and up (1) matrices of every layer's experts; may be FP8.
        down_LEDF: down matrices.
        layer: the layer's ordinal among those that have experts.
        choice_MX: the experts of each token; one outside 0 .. E − 1 is skipped (padding, another device's expert).
        weight_MX: their weights, float32.
    """
    if x_MD.shape[0] == 0:
        return x_MD
    if gate_up_LE2FD.scale is None and down_LEDF.scale is None:
        return _plain(x_MD, gate_up_LE2FD.values, down_LEDF.values, layer, choice_MX, weight_MX)
    return _forward(x_MD, gate_up_LE2FD, down_LEDF, layer, choice_MX, weight_MX)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Which tokens each block of rows holds. U slots in all, `size` a block.

    Attributes:
        token_U: the token of each slot; 0 where the slot is padding, whose output nobody reads and whose weight is 0.
        expert_W: the expert of each block.
        count: blocks that exist.
        slot_MX: the slot of each (token, choice) pair; beyond the last slot for a pair that is skipped.
        size: rows of a block.
    """

    token_U: jax.Array
    expert_W: jax.Array
    count: jax.Array
    slot_MX: jax.Array
    size: int = dataclasses.field(metadata={"static": True})


def _arrange(choice_MX: jax.Array, experts: int) -> _Blocks:
    tokens, chosen = choice_MX.shape
    pairs = tokens * chosen
    size = 1
    while size < _MOST_ROWS and size * experts < pairs:
        size *= 2
    if 1 < size < _FEW_ROWS:
        size *= 2
    blocks = min(pairs, -(-pairs // size) + experts)

    expert_Z = choice_MX.reshape(pairs)  # Z: pairs in the tokens' order
    expert_Z = jnp.where((expert_Z < 0) | (expert_Z >= experts), experts, expert_Z)  # skipped ones sort to the end
    order_Z = jnp.argsort(expert_Z, stable=True)
    sorted_Z = expert_Z[order_Z]
    pairs_E = jnp.zeros(experts, jnp.int32).at[expert_Z].add(1, mode="drop")
    blocks_E = (pairs_E + size - 1) // size
    first_pair_E = jnp.cumsum(pairs_E) - pairs_E
    last_block_E = jnp.cumsum(blocks_E)
    group_Z = jnp.minimum(sorted_Z, experts - 1)
    rank_Z = jnp.arange(pairs, dtype=jnp.int32) - first_pair_E[group_Z]
    slot_Z = jnp.where(sorted_Z < experts, (last_block_E - blocks_E)[group_Z] * size + rank_Z, blocks * size)
    empty = jnp.zeros(blocks * size, jnp.int32)
    return _Blocks(
        token_U=empty.at[slot_Z].set(order_Z.astype(jnp.int32) // chosen, mode="drop"),
        expert_W=jnp.searchsorted(last_block_E, jnp.arange(blocks), side="right").astype(jnp.int32),
        count=last_block_E[-1].astype(jnp.int32),
        slot_MX=jnp.zeros(pairs, jnp.int32).at[order_Z].set(slot_Z).reshape(tokens, chosen),
        size=size,
    )


def _rows(array_U: jax.Array, block: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array_U, block * size, size)


def _swiglu(x_UD: jax.Array, gate_up_2FD: jax.Array) -> jax.Array:
    """Gate and up as one matrix of 2F rows: as a three-dimensional one XLA on the CPU transposes it every time."""
    width = gate_up_2FD.shape[1]
    both_UN = einsum("UD,ND->UN", x_UD, gate_up_2FD.reshape(2 * width, -1))
    return jax.nn.silu(both_UN[:, :width]) * both_UN[:, width:]


def _outputs(x_MD: jax.Array, gate_up: Stack, down: Stack, layer: jax.Array, blocks: _Blocks) -> jax.Array:
    """Every slot's expert output, not yet weighted; slots of blocks that do not exist hold zeros."""

    def step(block: jax.Array, out_UD: jax.Array) -> jax.Array:
        expert = blocks.expert_W[block]
        x_UD = x_MD[_rows(blocks.token_U, block, blocks.size)]
        h_UF = _swiglu(x_UD, gate_up.at(layer, expert, dtype=x_MD.dtype))
        y_UD = einsum("UF,DF->UD", h_UF, down.at(layer, expert, dtype=x_MD.dtype))
        return lax.dynamic_update_slice_in_dim(out_UD, y_UD, block * blocks.size, 0)

    return lax.fori_loop(0, blocks.count, step, jnp.zeros((blocks.token_U.shape[0], x_MD.shape[1]), x_MD.dtype))


def _combine(out_UD: jax.Array, blocks: _Blocks, weight_MX: jax.Array) -> jax.Array:
    picked_MXD = _pick(out_UD, blocks).astype(jnp.float32)
    return jnp.sum(picked_MXD * weight_MX[..., None].astype(jnp.float32), axis=1)


def _pick(slots_U: jax.Array, blocks: _Blocks) -> jax.Array:
    """What the slots hold, pair by pair; zero for skipped pairs."""
    return slots_U.at[blocks.slot_MX].get(mode="fill", fill_value=0)


def _forward(
    x_MD: jax.Array, gate_up: Stack, down: Stack, layer: jax.Array, choice_MX: jax.Array, weight_MX: jax.Array
) -> jax.Array:
    blocks = _arrange(choice_MX, gate_up.values.shape[1])
    return _combine(_outputs(x_MD, gate_up, down, layer, blocks), blocks, weight_MX).astype(x_MD.dtype)


@jax.custom_vjp
def _plain(
    x_MD: jax.Array,
    gate_up_LE2FD: jax.Array,
    down_LEDF: jax.Array,
    layer: jax.Array,
    choice_MX: jax.Array,
    weight_MX: jax.Array,
) -> jax.Array:
    return _forward(x_MD, Stack(gate_up_LE2FD), Stack(down_LEDF), layer, choice_MX, weight_MX)


def _plain_forward(*args: Any) -> tuple[jax.Array, Any]:
    return _plain(*args), args


def _plain_backward(saved: Any, dy_MD: jax.Array) -> tuple[Any, ...]:
    """The same loop once more: each block adds to its expert's gradients in place, nothing is added up per layer."""
    x_MD, gate_up_LE2FD, down_LEDF, layer, choice_MX, weight_MX = saved
    blocks = _arrange(choice_MX, gate_up_LE2FD.shape[1])
    size, slots = blocks.size, blocks.token_U.shape[0]
    weight_U = jnp.zeros(slots, jnp.float32).at[blocks.slot_MX].set(weight_MX.astype(jnp.float32), mode="drop")

    def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx_UD, dweight_U, dgate_up_E2FD, ddown_EDF = carry
        expert = blocks.expert_W[block]
        token_U = _rows(blocks.token_U, block, size)
        x, gate_up, down = x_MD[token_U], take(gate_up_LE2FD, layer, expert), take(down_LEDF, layer, expert)
        h_UF, swiglu_vjp = jax.vjp(_swiglu, x, gate_up)
        dy_UD = dy_MD[token_U]
        dweight_block_U = jnp.sum(dy_UD.astype(jnp.float32) * einsum("UF,DF->UD", h_UF, down, out=jnp.float32), axis=1)
        dy_UD = (dy_UD * _rows(weight_U, block, size)[:, None]).astype(x.dtype)
        dx_block_UD, dgate_up = swiglu_vjp(einsum("UD,DF->UF", dy_UD, down))
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=block * size, axis=0)
        return (
            put(dx_UD, dx_block_UD),
            put(dweight_U, dweight_block_U),
            _add_at(dgate_up_E2FD, expert, dgate_up),
            _add_at(ddown_EDF, expert, einsum("UD,UF->DF", dy_UD, h_UF)),
        )

    zeros = (
        jnp.zeros((slots, x_MD.shape[1]), x_MD.dtype),
        jnp.zeros(slots, jnp.float32),
        jnp.zeros(gate_up_LE2FD.shape[1:], gate_up_LE2FD.dtype),
        jnp.zeros(down_LEDF.shape[1:], down_LEDF.dtype),
    )
    dx_UD, dweight_U, dgate_up, ddown = lax.fori_loop(0, blocks.count, step, zeros)
    return (
        jnp.sum(_pick(dx_UD, blocks).astype(jnp.float32), axis=1).astype(x_MD.dtype),
        _one_layer(gate_up_LE2FD, layer, dgate_up),
        _one_layer(down_LEDF, layer, ddown),
        None,
        None,
        _pick(dweight_U, blocks).astype(weight_MX.dtype),
    )


def _add_at(stack: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stack, take(stack, index) + value, index, 0)


def _one_layer(stack: jax.Array, layer: jax.Array, value: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(jnp.zeros_like(stack), value, layer, 0)


_plain.defvjp(_plain_forward, _plain_backward)
