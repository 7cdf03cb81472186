"""What the losses are, and which weights each of them reaches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glmjax.model.assemble import named_weights
from glmjax.model.cache import ContiguousCache, previous_hidden, whole_sequences
from glmjax.training.losses import Batch, cross_entropy, losses
from glmjax.training.recipe import densely

LENGTH = 12
IDS = jax.random.randint(jax.random.key(1), (2, LENGTH + 1), 0, 60)
STARTS = jnp.zeros_like(IDS).at[1, 5:].set(5)  # the second row holds two documents
BATCH = Batch(IDS, STARTS, jnp.ones(IDS.shape, bool))


@functools.partial(jax.jit, static_argnames="remat")
def gradients(model, mixture, remat=False):
    """Of a weighted sum of (next token, MTP, indexer): one program for all three."""
    graph, weights = nnx.split(model)

    def mixed(weights):
        out = losses(nnx.merge(graph, weights), BATCH, mtp_steps=2, distilled=LENGTH, remat=remat)
        return mixture[0] * out.next_token + mixture[1] * out.mtp_K.mean() + mixture[2] * out.indexer

    return jax.grad(mixed)(weights)


def reached(model, *mixture):
    found = nnx.merge(nnx.split(model)[0], gradients(model, jnp.array(mixture, jnp.float32)))
    return {path for path, weight in named_weights(found).items() if np.abs(weight.array).max() > 0}


@pytest.fixture(scope="module")
def computed():
    return jax.jit(lambda model, batch=BATCH: losses(model, batch, mtp_steps=3, mtp_rows=1, distilled=LENGTH))


def test_an_untrained_model_knows_nothing(tiny_model, computed):
    out = computed(tiny_model)
    assert abs(float(out.next_token) - math.log(64)) < 1.0
    assert out.mtp_K.shape == (3,)
    assert np.all(np.abs(out.mtp_K - math.log(64)) < 1.0)


def test_next_token_is_the_mean_cross_entropy_of_the_forward(tiny_model, computed):
    cache = ContiguousCache.create(tiny_model.config, 2, LENGTH, jnp.float32)
    step = cache.step(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)), STARTS[:, :-1])
    hidden = tiny_model.backbone(IDS[:, :-1], cache, step).hidden_BTD
    wanted = cross_entropy(tiny_model.head(hidden), IDS[:, 1:]).mean()
    np.testing.assert_allclose(computed(tiny_model).next_token, wanted, atol=1e-5)


def test_only_scored_targets_count(tiny_model, computed):
    """Whatever the others are, and all of them being left out is no division by zero."""
    scored = jnp.zeros(IDS.shape, bool).at[0, 3].set(True)
    found = computed(tiny_model, BATCH._replace(scored_BT=scored))
    cache = ContiguousCache.create(tiny_model.config, 2, LENGTH, jnp.float32)
    step = cache.step(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)), STARTS[:, :-1])
    logits = tiny_model.head(tiny_model.backbone(IDS[:, :-1], cache, step).hidden_BTD)
    np.testing.assert_allclose(found.next_token, cross_entropy(logits, IDS[:, 1:])[0, 2], atol=1e-5)
    nothing = computed(tiny_model, BATCH._replace(scored_BT=jnp.zeros(IDS.shape, bool)))
    assert float(nothing.next_token) == 0
    assert not np.any(nothing.mtp_K)


def test_the_mtp_layer_is_applied_to_its_own_output(tiny_model, computed):
    """The k-th application sees the hidden state that the one before it gave to the token before."""
    row = IDS[:1, :-1]
    cache, step = whole_sequences(tiny_model.config, row, jnp.float32)
    hidden = tiny_model.backbone(row, cache, step).hidden_BTD
    for k in (1, 2, 3):
        hidden = tiny_model.draft(row, previous_hidden(hidden, cache.tail_BD), cache, step).hidden_BTD
        wanted = cross_entropy(tiny_model.head(hidden), IDS[:1, 1:])[0, k:].mean()
        only_first = BATCH._replace(scored_BT=BATCH.scored_BT.at[1].set(False))
        np.testing.assert_allclose(computed(tiny_model, only_first).mtp_K[k - 1], wanted, atol=1e-5)


def test_documents_do_not_see_each_other(tiny_model):
    """The second document of a row gives the same hidden states alone, at the same positions of its own."""

    @jax.jit
    def hidden(model, ids, starts):
        cache = ContiguousCache.create(model.config, 1, ids.shape[1], jnp.float32, layered=False)
        return model.backbone(ids, cache, cache.step(jnp.arange(ids.shape[1])[None], starts)).hidden_BTD

    packed = hidden(tiny_model, IDS[1:, :-1], STARTS[1:, :-1])
    alone = hidden(tiny_model, IDS[1:, 5:-1], jnp.zeros((1, LENGTH - 5), jnp.int32))
    np.testing.assert_allclose(packed[:, 5:], alone, atol=2e-5)


def test_loads_are_shares_of_the_choices(tiny_model, computed):
    load = computed(tiny_model).load_LE
    assert load.shape == (2, 4)  # a sparse layer and the MTP layer
    np.testing.assert_allclose(load.sum(1), 1.0, rtol=1e-6)


def test_the_main_loss_reaches_all_but_indexer_mtp_and_bias(tiny_model):
    everything = set(named_weights(tiny_model))
    untouched = everything - reached(tiny_model, 1, 0, 0)
    assert all(p.startswith(("indexer.", "mtp.")) or p == "experts.router_bias_LE" for p in untouched)
    assert {p for p in everything if p.startswith(("indexer.", "mtp."))} <= untouched


def test_the_distillation_reaches_the_indexer_alone(tiny_model):
    assert reached(tiny_model, 0, 0, 1) == {p for p in named_weights(tiny_model) if p.startswith("indexer.")}


def test_the_mtp_loss_trains_its_layer_and_the_backbone(tiny_model):
    found = reached(tiny_model, 0, 1, 0)
    assert {p for p in named_weights(tiny_model) if p.startswith("mtp.")} <= found
    assert {"embed_VD", "head_VD", "attention.q_a_LQD"} <= found


def test_rematerialisation_changes_no_gradient(tiny_model):
    mixture = jnp.array([1.0, 0.5, 0.25])
    kept, recomputed = (jax.tree.leaves(gradients(tiny_model, mixture, remat)) for remat in (False, True))
    for a, b in zip(kept, recomputed, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_indexer_recalls_all_of_attention_where_it_leaves_nothing_out(tiny_model):
    short = Batch(*(x[:, : tiny_model.config.index_topk + 1] for x in BATCH))
    out = jax.jit(lambda model: losses(model, short, distilled=LENGTH))(tiny_model)
    assert float(out.recall) == 1.0


def test_densely_the_indexer_is_measured_all_the_same(tiny_model):
    """The dense model attends to everything; recall is still that of its index_topk best, and its loss is another."""

    @jax.jit
    def both(model):
        k = model.config.index_topk
        dense = losses(densely(model), BATCH, distilled=LENGTH, index_topk=k)
        return dense, losses(model, BATCH, distilled=LENGTH)

    dense, sparse = both(tiny_model)
    assert 0.5 < float(dense.recall) < 1
    assert 0.5 < float(sparse.recall) < 1
    assert float(dense.indexer) != pytest.approx(float(sparse.indexer), rel=1e-3)
    assert float(dense.next_token) != float(sparse.next_token)
