"""Weights to begin with: random, but such that looking up what followed last time is soon learned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.model.transformer import Transformer


def arrange(model: Transformer, *, common: float, seed: int) -> Transformer:
    """The model with two things arranged that random weights lack and that a small corpus does not make up for.

    - What all tokens have in common: the embeddings get a direction, `common` times as long as their own part. The
      network has no biases, and nothing else lets a first layer's attention find "the token before", whatever that is.
    - A way for a token through attention: its outputs write into an embedding's second half what the values read of the
      first (the same weights, transposed), and the head's second half begins as the embedding's first. To attend to a
      token then makes the same one likelier. The MTP layer takes the embedding as it is, beside what it makes of the
      hidden state, so that the same holds there.

    Args:
        model: random weights, not quantised.
        common: length of the common direction.
        seed: of that direction.
    """
    graph, weights = nnx.split(model)
    weights = jax.tree.map(lambda array: array, weights)  # variables of their own: the model keeps its weights
    attention, half = model.attention, model.config.hidden_size // 2
    embed_VD, values_LNOR = model.embed_VD.values[...], attention.v_b_LNOR.values[...]
    layers, _, _, latents = values_LNOR.shape
    read_LRD = attention.kv_a_LCD.values[:, :latents, :half]
    written_LDNO = jnp.einsum("LNOR,LRD->LDNO", values_LNOR, read_LRD) * (2 * layers) ** -0.5

    def begin(place: Any, array: jax.Array) -> None:
        place["values"].set_value(array)

    common_D = jax.random.normal(jax.random.key(seed), embed_VD.shape[1:], embed_VD.dtype)
    begin(weights["embed_VD"], embed_VD + common * jnp.std(embed_VD) * common_D)
    begin(weights["attention"]["o_LDNO"], attention.o_LDNO.values[...].at[:, -half:].set(written_LDNO))
    if model.head_VD is not None:
        copied_VD = embed_VD[:, :half] * model.config.hidden_size**-0.5
        begin(weights["head_VD"], model.head_VD.values[...].at[:, -half:].set(copied_VD))
    if model.mtp is not None:
        projection_D2D = model.mtp.projection_D2D.values[...]
        begin(weights["mtp"]["projection_D2D"], projection_D2D.at[:, 0].set(jnp.eye(model.config.hidden_size)))
    return nnx.merge(graph, weights)
