"""The lightning indexer: small queries and one key per token that decide what attention reads (model-spec: Indexer)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.model.config import GlmConfig
from glmjax.model.layers import Rope, layer_norm
from glmjax.model.weights import Declare
from glmjax.pallas.project import project


class Indexer(nnx.Module):
    """Indexers of all layers that have one, the MTP layer's last.

    Its inputs carry no gradient: the selection is a set, and what trains an indexer is its own distillation loss.
    """

    def __init__(self, config: GlmConfig, declare: Declare, layers: int):
        declare = declare.sized(L=layers)
        self.config = config
        self.q_LIJQ = declare.matrix("LIJQ", rows="IJ", columns="Q")
        self.k_LJD = declare.matrix("LJD", rows="J", columns="D")
        self.k_norm_LJ = declare.norm("LJ")
        self.k_norm_bias_LJ = declare.bias("LJ")
        self.head_weights_LID = declare.plain("LID", columns="D")

    def key(self, ordinal: jax.Array | int, x_BTD: jax.Array, rope: Rope) -> jax.Array:
        """The rows to cache, [B, T, J]: LayerNorm, then rope on the first P entries."""
        x_BTD = jax.lax.stop_gradient(x_BTD)
        k_BTJ = project("BTD,JD->BTJ", x_BTD, self.k_LJD.stack, ordinal)
        k_BTJ = layer_norm(
            k_BTJ, self.k_norm_LJ.at(ordinal), self.k_norm_bias_LJ.at(ordinal), self.config.index_norm_eps
        )
        return self._rotate_head(k_BTJ, rope)

    def query(
        self, ordinal: jax.Array | int, latent_BTQ: jax.Array, x_BTD: jax.Array, rope: Rope
    ) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, I, J] from the query latent, and the heads' weights [B, T, I] in float32."""
        latent_BTQ, x_BTD = jax.lax.stop_gradient((latent_BTQ, x_BTD))
        q_BTIJ = project("BTQ,IJQ->BTIJ", latent_BTQ, self.q_LIJQ.stack, ordinal)
        weights_BTI = project("BTD,ID->BTI", x_BTD, self.head_weights_LID.stack, ordinal)
        weights_BTI = weights_BTI.astype(jnp.float32) * self.config.index_n_heads**-0.5
        return self._rotate_head(q_BTIJ, rope), weights_BTI

    def _rotate_head(self, x: jax.Array, rope: Rope) -> jax.Array:
        width = self.config.qk_rope_head_dim
        return jnp.concatenate([rope.rotate(x[..., :width]), x[..., width:]], axis=-1)
