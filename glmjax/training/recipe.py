"""One training step: AdamW on a warm-up, stable, decay schedule, and routers kept in balance by their bias."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from glmjax.model.transformer import Transformer
from glmjax.training.losses import Losses, losses


class Stage(NamedTuple):
    """Steps of one shape.

    Attributes:
        steps: optimiser steps.
        batch_size: rows per step.
        seq_len: predictions per row.
    """

    steps: int
    batch_size: int
    seq_len: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        stages: shapes, one after the other; short rows first, since attention is what long ones cost.
        learning_rate: at its peak.
        warmup_steps: linear rise from zero.
        decay_share: share of the steps, at the end, over which the rate falls linearly to a twentieth.
        weight_decay: of matrices; norms, biases and embeddings have none.
        clip: norm to which gradients are clipped.
        mtp_weight: of the MTP loss.
        indexer_weight: of the distillation; its gradient touches the indexer alone.
        distilled: rows of the batch that the indexer learns from.
        balance_rate: by how much a router's bias moves per step towards an equal load (auxiliary-loss-free balance).
        seed: of weights and data order.
    """

    stages: tuple[Stage, ...] = (Stage(860, 16, 256), Stage(100, 4, 1024))
    learning_rate: float = 2.5e-3
    warmup_steps: int = 50
    decay_share: float = 0.4
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3
    indexer_weight: float = 1.0
    distilled: int = 2
    balance_rate: float = 1e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps in all; the schedule's length."""
        return sum(stage.steps for stage in self.stages)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds beside the data's position.

    Attributes:
        model: weights, float32.
        optimizer: Optax state.
        step: steps done, int32.
    """

    model: Transformer
    optimizer: Any
    step: jax.Array


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with clipping; the routers' biases are left to `balance`."""
    decay = max(1, round(recipe.steps * recipe.decay_share))
    peak = recipe.learning_rate
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, recipe.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, peak / 20, decay),
        ],
        [recipe.warmup_steps, max(recipe.warmup_steps, recipe.steps - decay)],
    )
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=_decayed),
    )


def start(model: Transformer, recipe: Recipe) -> TrainState:
    """The state before the first step."""
    return TrainState(model, optimizer(recipe).init(_weights(model)), jnp.int32(0))


def train_step(
    state: TrainState, ids_BT: jax.Array, start_BT: jax.Array, recipe: Recipe
) -> tuple[TrainState, Losses, jax.Array]:
    """One step; the new state, the losses before it and the gradient's norm. Jit it with ``recipe`` static."""

    def objective(weights: Any) -> tuple[jax.Array, Losses]:
        out = losses(_with(state.model, weights), ids_BT, start_BT, distilled=recipe.distilled)
        return out.next_token + recipe.mtp_weight * out.mtp + recipe.indexer_weight * out.indexer, out

    weights = _weights(state.model)
    gradients, out = jax.grad(objective, has_aux=True)(weights)
    updates, moments = optimizer(recipe).update(gradients, state.optimizer, weights)
    model = _with(state.model, optax.apply_updates(weights, updates))
    return TrainState(balance(model, out.load_LE, recipe), moments, state.step + 1), out, optax.tree.norm(gradients)


def balance(model: Transformer, load_LE: jax.Array, recipe: Recipe) -> Transformer:
    """Raise the bias of experts with less than their share of the tokens, lower that of the others."""
    bias = model.experts.router_bias_LE.values
    moved_LE = bias[...] + recipe.balance_rate * jnp.sign(1 / load_LE.shape[1] - load_LE)
    weights = jax.tree.map(lambda array: array, _weights(model))  # its variables are new ones, the model's stay
    weights["experts"]["router_bias_LE"]["values"].set_value(moved_LE)
    return _with(model, weights)


def _weights(model: Transformer) -> Any:
    return nnx.split(model)[1]


def _with(model: Transformer, weights: Any) -> Transformer:
    return nnx.merge(nnx.split(model)[0], weights)


def _decayed(weights: Any) -> Any:
    """Which weights decay: those of at least two dimensions beside the layers', embeddings and head excepted."""

    def decays(path: Any, value: jax.Array) -> bool:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        return "norm" not in name and "bias" not in name and "_VD" not in name and value.ndim >= 2

    return jax.tree_util.tree_map_with_path(decays, weights)
