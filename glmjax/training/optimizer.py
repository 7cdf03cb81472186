"""What turns gradients into updates: AdamW on a warm-up, stable, decay schedule."""

from __future__ import annotations

from typing import Any

import jax
import optax


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


def optimizer(rate: optax.Schedule, *, weight_decay: float, clip: float) -> optax.GradientTransformation:
    """AdamW with clipping.

    Args:
        rate: learning rate by step.
        weight_decay: of matrices; norms, biases, embedding and head have none.
        clip: norm to which gradients are clipped.
    """
    adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def _decayed(weights: Any) -> Any:
    """Which weights decay: those of at least two dimensions beside the layers', embedding and head excepted."""

    def decays(path: Any, value: jax.Array) -> bool:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        return "norm" not in name and "bias" not in name and "_VD" not in name and value.ndim >= 2

    return jax.tree_util.tree_map_with_path(decays, weights)
