"""What turns gradients into updates: Muon for matrices, AdamW for the rest, on a warm-up, stable, decay schedule."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from glmjax.model.assemble import named_weights
from glmjax.model.transformer import Transformer
from glmjax.model.weights import Weight


def schedule(peak: float, steps: int, warmup_steps: int, decay_share: float) -> optax.Schedule:
    """A rate that rises linearly, stays, and falls linearly to a twentieth.

    Args:
        peak: the rate between.
        steps: of the whole run.
        warmup_steps: of the rise.
        decay_share: share of the steps, at the end, over which it falls.
    """
    decay = max(1, round(steps * decay_share))
    pieces = [
        optax.linear_schedule(0.0, peak, warmup_steps),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, peak / 20, decay),
    ]
    return optax.join_schedules(pieces, [warmup_steps, max(warmup_steps, steps - decay)])


def optimizer(
    model: Transformer, rate: optax.Schedule, *, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """Muon as GLM-4.5 and Moonlight use it (arXiv 2502.16982): updates of a matrix orthogonalised, with Adam's size.

    Every matrix of a stack (layer, expert, gate or up) is orthogonalised by itself. Embedding, head, norms and biases
    get AdamW. Embedding, head and vectors do not decay.

    Args:
        model: whose weights.
        rate: learning rate by step.
        weight_decay: of matrices.
        clip: norm to which gradients are clipped.
    """
    shapes = matrices(model)
    decayed = jax.tree.map(lambda shape: shape is not None, shapes, is_leaf=_is_shape)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        muon(
            rate,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=shapes,
        ),
    )


def matrices(model: Transformer) -> Any:
    """Which axes of a weight are a matrix's columns and rows, in the form of the weights; None for what is no matrix."""
    weights = named_weights(model)

    def shape(path: tuple[Any, ...], _: jax.Array) -> MuonDimensionNumbers | None:
        *names, _leaf = (str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        return _matrix(weights[".".join(name for name in names if name != "values")])

    return jax.tree_util.tree_map_with_path(shape, nnx.split(model)[1])


def _matrix(weight: Weight) -> MuonDimensionNumbers | None:
    letters = weight.letters
    if weight.columns == 0 or letters == "VD":
        return None
    columns = range(len(letters) - weight.columns, len(letters))
    others = [axis for axis in range(columns[0]) if letters[axis] not in "L2"]
    rows = [axis for axis in others if letters[axis] != "E"] or others  # experts by themselves, a router as a whole
    return MuonDimensionNumbers(reduction_axis=tuple(columns), output_axis=tuple(rows))


def _is_shape(value: Any) -> bool:
    return value is None or isinstance(value, MuonDimensionNumbers)
