"""One training step: what the stages are, and routers kept in balance by their bias."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from glmjax.model.transformer import Transformer, densely
from glmjax.training.initialization import arrange
from glmjax.training.losses import Batch, Losses, losses
from glmjax.training.optimizer import optimizer, schedule
from glmjax.training.tasks import Shares


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps of one shape.

    Attributes:
        steps: optimiser steps.
        batch_size: rows per step.
        seq_len: predictions per row.
        attention: "dense" to everything visible, while the indexer learns to follow it; "sparse" to what it selects.
        mtp_steps: how often the MTP layer is applied to its own output; 0 leaves it as it is, and a step costs half.
        shares: of the rows that each task rewrites.
    """

    steps: int
    batch_size: int
    seq_len: int
    attention: Literal["dense", "sparse"]
    mtp_steps: int
    shares: Shares


_SHARES = Shares(infill=0.2, recall=0.1, repeat=0.1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        stages: shapes, one after the other.
        learning_rate: at its peak.
        warmup_steps: linear rise from zero.
        decay_share: share of the steps, at the end, over which the rate falls linearly to a twentieth.
        weight_decay: of matrices; norms, biases, embedding and head have none.
        clip: norm to which gradients are clipped.
        mtp_weight: of the MTP loss, the mean over its applications.
        mtp_share: share of a batch's rows that applications after the first see.
        indexer_weight: of the distillation; its gradient touches the indexer alone.
        distilled: queries of each row that the indexer learns from.
        infill_share: share of the rows with blanks to fill.
        recall_share: share of the rows with lines to recall.
        common: how long a direction that all embeddings have in common is at first, beside their own; see `arrange`.
        balance_rate: by how much a router's bias moves per step towards an equal load (auxiliary-loss-free balance,
            arXiv 2408.15664).
        seed: of weights and data order.
    """

    stages: tuple[Stage, ...] = (
        Stage(400, 32, 64, "dense", mtp_steps=3, shares=Shares(copies=1.0)),
        Stage(1500, 16, 256, "dense", mtp_steps=1, shares=_SHARES),
        Stage(600, 8, 512, "dense", mtp_steps=3, shares=_SHARES),
        Stage(200, 4, 1024, "dense", mtp_steps=3, shares=_SHARES),
        Stage(300, 4, 1024, "sparse", mtp_steps=3, shares=_SHARES),
        Stage(150, 2, 2048, "sparse", mtp_steps=3, shares=_SHARES),
    )
    learning_rate: float = 2.5e-3
    warmup_steps: int = 50
    decay_share: float = 0.4
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3
    mtp_share: float = 0.25
    indexer_weight: float = 1.0
    distilled: int = 32
    common: float = 1.0
    balance_rate: float = 1e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps in all; the schedule's length."""
        return sum(stage.steps for stage in self.stages)

    def optimizer(self) -> optax.GradientTransformation:
        """Of the whole run; the routers' biases are left to `balance`."""
        rate = schedule(self.learning_rate, self.steps, self.warmup_steps, self.decay_share)
        return optimizer(rate, weight_decay=self.weight_decay, clip=self.clip)


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


def start(model: Transformer, recipe: Recipe) -> TrainState:
    """The state before the first step: random weights, arranged so that looking up is soon learned."""
    model = arrange(model, common=recipe.common, seed=recipe.seed)
    return TrainState(model, recipe.optimizer().init(_weights(model)), jnp.int32(0))


def train_step(state: TrainState, batch: Batch, recipe: Recipe, stage: Stage) -> tuple[TrainState, Losses, jax.Array]:
    """One step; the new state, the losses before it and the gradient's norm. Jit it with recipe and stage static."""
    rows = batch.ids_BT.shape[0]
    attending = densely(state.model) if stage.attention == "dense" else state.model

    def objective(weights: Any) -> tuple[jax.Array, Losses]:
        out = losses(
            _with(attending, weights),
            batch,
            mtp_steps=stage.mtp_steps,
            mtp_rows=max(1, round(rows * recipe.mtp_share)),
            distilled=recipe.distilled,
            index_topk=state.model.config.index_topk,
        )
        mtp = jnp.sum(out.mtp_K) / max(1, stage.mtp_steps)
        return out.next_token + recipe.mtp_weight * mtp + recipe.indexer_weight * out.indexer, out

    weights = _weights(state.model)
    gradients, out = jax.grad(objective, has_aux=True)(weights)
    updates, moments = recipe.optimizer().update(gradients, state.optimizer, weights)
    model = _with(state.model, optax.apply_updates(weights, updates))
    return TrainState(balance(model, out.load_LE, recipe), moments, state.step + 1), out, optax.tree.norm(gradients)


def balance(model: Transformer, load_LE: jax.Array, recipe: Recipe) -> Transformer:
    """Raise the bias of experts with less than their share of the tokens, lower that of the others.

    Args:
        model: whose routers.
        load_LE: shares of the choices in each layer; layers after the last of them have made none.
        recipe: with the rate.
    """
    bias_LE = model.experts.router_bias_LE.values[...]
    layers, experts = load_LE.shape
    moved_LE = bias_LE.at[:layers].add(recipe.balance_rate * jnp.sign(1 / experts - load_LE))
    weights = _copy(model)
    weights["experts"]["router_bias_LE"]["values"].set_value(moved_LE)
    return _with(model, weights)


def _weights(model: Transformer) -> Any:
    return nnx.split(model)[1]


def _copy(model: Transformer) -> Any:
    """Its weights in variables of their own, which may be set while the model's stay."""
    return jax.tree.map(lambda array: array, _weights(model))


def _with(model: Transformer, weights: Any) -> Transformer:
    return nnx.merge(nnx.split(model)[0], weights)
