"""What initial weights are arranged for: something in common, and tokens that come through attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.training.initialization import arrange


def test_embeddings_have_a_direction_in_common(tiny_model):
    def likeness(model):
        unit_VD = model.embed_VD.array / jnp.linalg.norm(model.embed_VD.array, axis=1, keepdims=True)
        return float(jnp.mean(unit_VD @ unit_VD.T))

    assert likeness(tiny_model) < 0.1
    assert likeness(arrange(tiny_model, common=0.0, seed=0)) < 0.1
    assert likeness(arrange(tiny_model, common=1.0, seed=0)) == pytest.approx(0.5, abs=0.1)


def test_attention_to_a_token_makes_it_likelier(tiny_model):
    """What a layer's values and outputs make of a token, before anything is learned."""

    def places(model, layer):
        """How many tokens become likelier than the one attended to; of 64, a row for each."""
        attention, x_VD = model.attention, model.embed_VD.array
        latents_VR = x_VD @ attention.kv_a_LCD.array[layer, : model.config.kv_lora_rank].T
        out_VD = jnp.einsum(
            "VR,NOR,DNO->VD", latents_VR, attention.v_b_LNOR.array[layer], attention.o_LDNO.array[layer]
        )
        logits_VV = out_VD @ model.head_VD.array.T
        return np.asarray(jnp.sum(logits_VV > jnp.diagonal(logits_VV)[:, None], axis=1))

    model = arrange(tiny_model, common=0.0, seed=0)
    for layer in range(model.config.num_hidden_layers):  # half of 63 would be chance
        assert np.median(places(model, layer)) < 8
        assert np.median(places(tiny_model, layer)) > 20


def test_the_mtp_layer_takes_the_embedding_as_it_is(tiny_model):
    """Beside what it makes of the hidden state, so that what is arranged for embeddings holds there too."""
    projection_DzD = arrange(tiny_model, common=1.0, seed=0).mtp.projection_D2D.array
    np.testing.assert_array_equal(projection_DzD[:, 0], np.eye(tiny_model.config.hidden_size))
    np.testing.assert_array_equal(projection_DzD[:, 1], tiny_model.mtp.projection_D2D.array[:, 1])


def test_the_given_model_keeps_its_weights(tiny_model):
    before = [np.array(leaf) for leaf in jax.tree.leaves(tiny_model)]
    arrange(tiny_model, common=1.0, seed=0)
    for kept, leaf in zip(before, jax.tree.leaves(tiny_model), strict=True):
        np.testing.assert_array_equal(kept, leaf)
