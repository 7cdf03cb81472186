"""Multi-head latent attention in its absorbed form (model-spec: MLA)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.model.cache import Cache, Step
from glmjax.model.config import GlmConfig
from glmjax.model.layers import Rope
from glmjax.model.weights import Declare
from glmjax.pallas.project import project
from glmjax.pallas.rms_norm import rms_norm
from glmjax.pallas.selection import Selection


class Attention(nnx.Module):
    """Attention weights of all layers, the MTP layer's last.

    The checkpoint's kv_b is held as its key half and its value half per head, since the absorbed form uses them apart:
    score = (K_hᵀ q_nope) · c + q_rope · k_rope and out = V_h Σ p c.
    """

    def __init__(self, config: GlmConfig, declare: Declare, layers: int):
        declare = declare.sized(L=layers)
        row_step = math.gcd(config.qk_nope_head_dim, config.v_head_dim)
        self.config = config
        self.q_a_LQD = declare.matrix("LQD", rows="Q", columns="D")
        self.q_a_norm_LQ = declare.norm("LQ")
        self.q_b_LNYQ = declare.matrix("LNYQ", rows="NY", columns="Q")
        self.kv_a_LCD = declare.matrix("LCD", rows="C", columns="D")
        self.kv_a_norm_LR = declare.norm("LR")
        self.k_b_LNHR = declare.matrix("LNHR", rows="NH", columns="R", row_step=row_step)
        self.v_b_LNOR = declare.matrix("LNOR", rows="NO", columns="R", row_step=row_step)
        self.o_LDNO = declare.matrix("LDNO", rows="D", columns="NO", gain=(2 * layers) ** -0.5)
        biased = config.attention_bias
        self.q_a_bias_LQ = declare.bias("LQ") if biased else None
        self.kv_a_bias_LC = declare.bias("LC") if biased else None
        self.o_bias_LD = declare.bias("LD") if biased else None

    def query_latent(self, layer: Any, x_BTD: jax.Array) -> jax.Array:
        """The query's normed latent [B, T, Q]; the indexer's queries start from it too."""
        q_BTQ = project("BTD,QD->BTQ", x_BTD, self.q_a_LQD.stack, layer)
        if self.q_a_bias_LQ is not None:
            q_BTQ = q_BTQ + self.q_a_bias_LQ.at(layer)
        return rms_norm(q_BTQ, self.q_a_norm_LQ.array, layer, eps=self.config.latent_norm_eps)

    def row(self, layer: Any, x_BTD: jax.Array, rope: Rope) -> jax.Array:
        """What is cached, [B, T, C]: the normed latent, then the rotated key that all heads share."""
        width = self.config.kv_lora_rank
        kv_BTC = project("BTD,CD->BTC", x_BTD, self.kv_a_LCD.stack, layer)
        if self.kv_a_bias_LC is not None:
            kv_BTC = kv_BTC + self.kv_a_bias_LC.at(layer)
        latent_BTR = rms_norm(kv_BTC[..., :width], self.kv_a_norm_LR.array, layer, eps=self.config.latent_norm_eps)
        return jnp.concatenate([latent_BTR, rope.rotate(kv_BTC[..., width:])], axis=-1)

    def query(self, layer: Any, latent_BTQ: jax.Array, rope: Rope) -> jax.Array:
        """Absorbed queries [B, T, N, C]: [K_hᵀ q_nope | rotated q_rope]."""
        q_BTNY = project("BTQ,NYQ->BTNY", latent_BTQ, self.q_b_LNYQ.stack, layer)
        q_nope_BTNH, q_rope_BTNP = jnp.split(q_BTNY, [self.config.qk_nope_head_dim], axis=-1)
        q_BTNR = project("BTNH,NHR->BTNR", q_nope_BTNH, self.k_b_LNHR.stack, layer)
        return jnp.concatenate([q_BTNR, rope.rotate(q_rope_BTNP)], axis=-1)

    def __call__(
        self, layer: Any, latent_BTQ: jax.Array, selected: Selection, cache: Cache, step: Step, rope: Rope
    ) -> jax.Array:
        """Attend to the selected rows of the cache, which already holds the tokens' own; [B, T, D]."""
        q_BTNC, width = self.query(layer, latent_BTQ, rope), self.config.kv_lora_rank
        o_BTNR = cache.attend(layer, q_BTNC, selected, step, scale=self.config.softmax_scale, value_width=width)
        o_BTNO = project("BTNR,NOR->BTNO", o_BTNR, self.v_b_LNOR.stack, layer)
        out_BTD = project("BTNO,DNO->BTD", o_BTNO, self.o_LDNO.stack, layer)
        return out_BTD if self.o_bias_LD is None else out_BTD + self.o_bias_LD.at(layer)
