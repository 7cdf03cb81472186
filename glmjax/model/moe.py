"""Router and experts (model-spec: Router, Experts)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from glmjax.model.config import GlmConfig
from glmjax.model.layers import swiglu
from glmjax.model.weights import Declare
from glmjax.pallas.experts import experts
from glmjax.pallas.project import project


class Experts(nnx.Module):
    """Routers, routed and shared experts of all sparse layers, the MTP layer's last."""

    def __init__(self, config: GlmConfig, declare: Declare, layers: int, gain: float):
        shared = declare.sized(L=layers, F=config.moe_intermediate_size * config.n_shared_experts)
        declare = declare.sized(L=layers, F=config.moe_intermediate_size)
        self.config = config
        self.router_LED = declare.plain("LED", columns="D")
        self.router_bias_LE = declare.bias("LE", dtype=jnp.float32)
        self.gate_up_LE2FD = declare.matrix("LE2FD", rows="F", columns="D")
        self.down_LEDF = declare.matrix("LEDF", rows="D", columns="F", gain=gain)
        self.shared_gate_up_L2FD = shared.matrix("L2FD", rows="F", columns="D")
        self.shared_down_LDF = shared.matrix("LDF", rows="D", columns="F", gain=gain)

    def route(self, ordinal: Any, x_BTD: jax.Array, forced_BTX: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Each token's experts [B, T, X] and their weights (float32).

        Always float32. The bias decides who is chosen, not with what weight; ties go to the lowest expert.

        Args:
            ordinal: index among the sparse layers.
            x_BTD: normed input.
            forced_BTX: experts to take instead of the best ones (comparisons, replays).
        """
        config = self.config
        p_BTE = self._probabilities(ordinal, x_BTD)
        choice_BTX = forced_BTX
        if choice_BTX is None:
            choice_BTX = lax.top_k(self._ranked(ordinal, p_BTE), config.num_experts_per_tok)[1]
        weight_BTX = jnp.take_along_axis(p_BTE, choice_BTX, axis=-1)
        if config.norm_topk_prob:
            weight_BTX = weight_BTX / (jnp.sum(weight_BTX, axis=-1, keepdims=True) + 1e-20)
        return choice_BTX, weight_BTX * config.routed_scaling_factor

    def scores(self, ordinal: Any, x_BTD: jax.Array) -> jax.Array:
        """What decides who is chosen [B, T, E], float32; −inf outside the groups that are.

        Args:
            ordinal: index among the sparse layers.
            x_BTD: normed input.
        """
        return self._ranked(ordinal, self._probabilities(ordinal, x_BTD))

    def _probabilities(self, ordinal: Any, x_BTD: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(project("BTD,ED->BTE", x_BTD.astype(jnp.float32), self.router_LED.stack, ordinal))

    def _ranked(self, ordinal: Any, p_BTE: jax.Array) -> jax.Array:
        return self._within_groups(lax.stop_gradient(p_BTE) + self.router_bias_LE.at(ordinal))

    def _within_groups(self, score_BTE: jax.Array) -> jax.Array:
        """Scores with those outside the best groups at −inf; a group counts as much as its best two experts."""
        groups, kept = self.config.n_group, self.config.topk_group
        if groups == kept:
            return score_BTE
        grouped = score_BTE.reshape(*score_BTE.shape[:-1], groups, -1)
        best_two = jnp.sum(lax.top_k(grouped, 2)[0], axis=-1)
        chosen = lax.top_k(best_two, kept)[1]
        keep = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
        return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(score_BTE.shape)

    def __call__(
        self, ordinal: Any, x_BTD: jax.Array, real_BT: jax.Array, forced_BTX: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Routed experts plus the shared ones, [B, T, D]; and the choice [B, T, X], −1 for padding."""
        batch, length, width = x_BTD.shape
        choice_BTX, weight_BTX = self.route(ordinal, x_BTD, forced_BTX)
        choice_BTX = jnp.where(real_BT[..., None], choice_BTX, -1)  # padding reads no expert
        routed_MD = experts(
            x_BTD.reshape(batch * length, width),
            self.gate_up_LE2FD.stack,
            self.down_LEDF.stack,
            jnp.asarray(ordinal, jnp.int32),
            choice_BTX.reshape(batch * length, -1),
            weight_BTX.reshape(batch * length, -1),
        )
        shared_BTD = swiglu(x_BTD, self.shared_gate_up_L2FD.stack, self.shared_down_LDF.stack, ordinal)
        return routed_MD.reshape(x_BTD.shape) + shared_BTD, choice_BTX
