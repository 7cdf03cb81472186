"""Properties of the one forward that no golden set shows: depth, memory, padding, the MTP layer's options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glmjax.model.assemble import abstract
from glmjax.model.cache import ContiguousCache, previous_hidden
from glmjax.model.config import Fp8Format
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source
from glmjax.pallas import blocks
from glmjax.pallas.selection import positions


def forward(model, ids_BT):
    cache = ContiguousCache.create(model.config, *ids_BT.shape, model.dtype, layered=False)
    return model.backbone(ids_BT, cache, cache.step(jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)))


def lowered(config, length):
    model = abstract(config, jnp.float32, mtp=False, fp8=False)
    return jax.jit(lambda m, ids: forward(m, ids).hidden_BTD).lower(model, jax.ShapeDtypeStruct((1, length), jnp.int32))


def test_the_program_does_not_grow_with_depth(sparse):
    def size(layers):
        kinds = {"mlp_layer_types": ("dense",) * 2 + ("sparse",) * (layers - 2), "indexer_types": ("full",) * layers}
        return len(lowered(dataclasses.replace(sparse.model.config, num_hidden_layers=layers, **kinds), 16).as_text())

    assert size(50) < 1.02 * size(5)


def test_memory_grows_linearly_with_the_context(sparse, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 18)

    def temporaries(length):
        return lowered(sparse.model.config, length).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 4.5 * short


def test_padding_changes_nothing(sparse):
    """The same tokens with padding before, between and after them."""
    ids, columns = sparse.ids[:, :12], np.array([1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14])
    padded, positions = np.full((1, 16), 159, np.int32), np.full((1, 16), -1)
    padded[0, columns], positions[0, columns] = ids[0], np.arange(12)

    @jax.jit
    def run(model, ids, positions):
        cache = ContiguousCache.create(model.config, 1, 16, jnp.float32)
        return model.backbone(ids, cache, cache.step(positions)).hidden_BTD

    wanted = run(sparse.model, np.pad(ids, ((0, 0), (0, 4))), np.r_[np.arange(12), [-1] * 4][None])[:, :12]
    found = run(sparse.model, padded, positions)
    np.testing.assert_allclose(found[:, columns], wanted, atol=2e-5)
    assert np.isfinite(found).all()


@jax.jit
def drafted(model, ids, selected=None):
    out = forward(model, ids)
    cache = ContiguousCache.create(model.config, *ids.shape, jnp.float32, layered=False)
    step = cache.step(jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    draft = model.draft(ids, previous_hidden(out.hidden_BTD, cache.tail_BD), cache, step, selected=selected)
    return draft.hidden_BTD, positions(draft.selected, ids.shape[1])


def test_a_draft_can_reuse_a_selection(sparse):
    """`index_share_for_mtp_iteration`: with its own selection handed back, the layer gives what it gave."""
    hidden, selected = drafted(sparse.model, sparse.ids[:, :16])
    again, reused = drafted(sparse.model, sparse.ids[:, :16], selected)
    np.testing.assert_array_equal(reused, selected)
    np.testing.assert_allclose(again, hidden, atol=1e-6)
    other, _ = drafted(sparse.model, sparse.ids[:, :16], jnp.where(selected == 1, -1, selected))
    assert np.abs(other - hidden).max() > 1e-3


def test_the_first_mtp_row_sees_nothing_and_is_seen_by_none(sparse):
    _, selected = drafted(sparse.model, sparse.ids[:, :16])
    assert (np.asarray(selected[:, 0]) == -1).all()
    assert not (np.asarray(selected) == 0).any()


def test_zeroing_the_first_embedding_is_an_option(sparse):
    """vLLM zeroes the embedding of textbook slot 0, which is row 1 here."""
    graph, weights = nnx.split(sparse.model)
    zeroing = nnx.merge(graph, weights)
    zeroing.config = dataclasses.replace(sparse.model.config, mtp_zero_first_embedding=True)
    plain, _ = drafted(sparse.model, sparse.ids[:, :16])
    zeroed, _ = drafted(zeroing, sparse.ids[:, :16])
    assert np.abs(zeroed[:, 1] - plain[:, 1]).max() > 1e-3
    np.testing.assert_array_equal(zeroed[:, 0], plain[:, 0])


def test_drafting_without_mtp_weights_is_refused(sparse):
    model = abstract(sparse.model.config, jnp.float32, mtp=False, fp8=False)
    cache = ContiguousCache.create(sparse.model.config, 1, 48, jnp.float32)
    with pytest.raises(ValueError, match="no MTP weights"):
        model.draft(sparse.ids, jnp.zeros((1, 48, 64)), cache, cache.step(jnp.arange(48)[None]))


def test_fp8_needs_a_format(sparse):
    with pytest.raises(ValueError, match="no quantization"):
        Transformer(sparse.model.config, dtype=jnp.float32, rngs=random_source(0), fp8=True)
    config = dataclasses.replace(sparse.model.config, quantization=Fp8Format())
    assert abstract(config, jnp.float32, mtp=False, fp8=True).experts.down_LEDF.array.dtype == jnp.uint8


def test_the_head_can_be_the_embedding(sparse):
    config = dataclasses.replace(sparse.model.config, tie_word_embeddings=True)
    model = Transformer(config, dtype=jnp.float32, rngs=random_source(0), mtp=False)
    assert model.head_VD is None
    hidden = jnp.ones((1, 1, config.hidden_size))
    np.testing.assert_allclose(model.head(hidden)[0, 0], model.embed_VD.array.sum(axis=1), rtol=1e-4, atol=1e-4)
