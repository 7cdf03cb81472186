"""Hugging Face's numbers: logits, hidden states, selections, routing and MTP of every golden set."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.model import checkpoint
from glmjax.model.cache import ContiguousCache, previous_hidden
from glmjax.model.transformer import Forced, LayerView
from glmjax.pallas.selection import positions

TOLERANCE = 5e-5


class Kept(NamedTuple):
    hidden: jax.Array
    selected: jax.Array
    choice: jax.Array | None
    attention: jax.Array
    mlp: jax.Array


def where(view: LayerView) -> jax.Array:
    return positions(view.selected, view.selected.shape[-1])


def keep(view: LayerView) -> Kept:
    return Kept(view.hidden_BTD, where(view), view.choice_BTX, view.attention_BTD, view.mlp_BTD)


@functools.partial(jax.jit, static_argnames="capacity")
def whole(model, ids_BT, capacity=None):
    """One forward over whole sequences: logits, MTP logits, what every layer did."""
    batch, length = ids_BT.shape
    cache = ContiguousCache.create(
        model.config, batch, capacity or length, model.dtype, layered=capacity is not None, mtp=capacity is not None
    )
    step = cache.step(jnp.broadcast_to(jnp.arange(length), ids_BT.shape))
    out = model.backbone(ids_BT, cache, step, observe=keep)
    drafted = None
    if model.mtp is not None:
        drafted = model.draft(ids_BT, previous_hidden(out.hidden_BTD, cache.tail_BD), out.cache, step, observe=keep)
        drafted = (model.head(drafted.hidden_BTD), drafted.observed[0])
    return model.head(out.hidden_BTD), out.hidden_BTD, drafted, out.observed


def as_mask(selected_BTK, length):
    mask = np.zeros((*selected_BTK.shape[:2], length + 1), np.uint8)
    np.put_along_axis(mask, np.asarray(selected_BTK), 1, axis=-1)  # -1 is the extra last column
    return mask[..., :length]


def close(found, wanted, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=0, atol=tolerance)


def test_logits_agree(each):
    logits, *_ = whole(each.model, each.ids)
    close(logits, each.tensors["logits"])


def test_every_layer_agrees(recorded):
    _, final, _, layers = whole(recorded.model, recorded.ids)
    close(final, recorded.tensors["hidden.final"])
    for i, layer in enumerate(layers):
        close(layer.hidden, recorded.tensors[f"hidden.{i + 1}"])
        close(layer.attention, recorded.tensors[f"attn_out.{i}"])
        close(layer.mlp, recorded.tensors[f"mlp_out.{i}"])


def test_selections_are_identical(recorded):
    *_, layers = whole(recorded.model, recorded.ids)
    for i, layer in enumerate(layers):
        found = as_mask(layer.selected, recorded.ids.shape[1])
        np.testing.assert_array_equal(found, recorded.tensors[f"selected.{i}"])


def test_routing_is_identical(recorded):
    config = recorded.model.config
    *_, layers = whole(recorded.model, recorded.ids)
    for i in (i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"):
        found = np.sort(np.asarray(layers[i].choice).reshape(-1, config.num_experts_per_tok))
        np.testing.assert_array_equal(found, np.sort(recorded.tensors[f"router_idx.{i}"]))


def test_mtp_agrees(drafting):
    _, _, (logits, layer), _ = whole(drafting.model, drafting.ids)
    close(logits[:, 1:], drafting.tensors["mtp_logits"])  # slot t is row t + 1
    rows = as_mask(layer.selected[:, 1:], drafting.ids.shape[1])[..., 1:]
    np.testing.assert_array_equal(rows, drafting.tensors["mtp_selected"])


def test_mtp_weights_are_optional(each):
    assert (each.model.mtp is not None) == (each.name in ("sparse", "shared_indexer", "fp8"))


def test_fp8_dequantised_on_load_agrees_as_kept_fp8_does(fp8):
    assert fp8.model.attention.q_a_LQD.scale is not None
    dequantised = checkpoint.load(fp8.path, dtype=jnp.float32, fp8="dequantize")
    assert dequantised.attention.q_a_LQD.scale is None
    close(whole(dequantised, fp8.ids)[0], fp8.tensors["logits"])


def test_capacity_beyond_the_sequence_changes_nothing(sparse):
    close(whole(sparse.model, sparse.ids, capacity=64)[0], sparse.tensors["logits"])


@functools.partial(jax.jit, static_argnames="chunk")
def in_chunks(model, ids_BT, chunk):
    """Logits and MTP logits by a scan over chunks of the sequence, through one cache."""
    batch, length = ids_BT.shape
    cache = ContiguousCache.create(model.config, batch, length, model.dtype, mtp=model.mtp is not None)
    count = -(-length // chunk)
    padded = jnp.pad(ids_BT, ((0, 0), (0, count * chunk - length)))

    def body(cache, n):
        positions = n * chunk + jnp.arange(chunk)
        ids = jax.lax.dynamic_slice_in_dim(padded, n * chunk, chunk, axis=1)
        step = cache.step(jnp.broadcast_to(jnp.where(positions < length, positions, -1), ids.shape))
        out = model.backbone(ids, cache, step, observe=where)
        cache, mtp = out.cache, jnp.zeros((), jnp.float32)
        if model.mtp is not None:
            draft = model.draft(ids, previous_hidden(out.hidden_BTD, cache.tail_BD), cache, step)
            cache, mtp = draft.cache, model.head(draft.hidden_BTD)
        return cache.commit(step, out.hidden_BTD), (model.head(out.hidden_BTD), mtp, out.observed)

    _, (logits, mtp, selected) = jax.lax.scan(body, cache, jnp.arange(count))

    def joined(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * chunk, -1)[:, :length]

    return joined(logits), joined(mtp) if model.mtp is not None else None, [joined(s) for s in selected]


@pytest.mark.parametrize("chunk", [1, 7])  # index_topk is 8, the sequence 48
def test_prefill_in_chunks_and_token_by_token_agree_with_one_piece(each, chunk):
    logits, mtp, selected = in_chunks(each.model, each.ids, chunk)
    close(logits, each.tensors["logits"])
    if "logits_decode" in each.tensors:
        close(logits, each.tensors["logits_decode"])
        for i, rows in enumerate(selected):
            np.testing.assert_array_equal(as_mask(rows, each.ids.shape[1]), each.tensors[f"selected_decode.{i}"])
    if "mtp_logits" in each.tensors:
        close(mtp[:, 1:], each.tensors["mtp_logits"])


def test_bfloat16_layer_by_layer_with_choices_forced(drafting):
    """Each layer in bf16 from the reference's own input: rounding may not flip a choice, so choices are forced."""
    model = checkpoint.load(drafting.path, dtype=jnp.bfloat16)
    tensors, length = drafting.tensors, drafting.ids.shape[1]
    forced = []
    for i, kind in enumerate(model.config.mlp_layer_types):
        order = np.argsort(-tensors[f"selected.{i}"].astype(np.int32), axis=-1, kind="stable")
        order = order[..., : model.config.index_topk].astype(np.int32)
        chosen = np.take_along_axis(tensors[f"selected.{i}"], order, axis=-1) > 0
        experts = (
            jnp.asarray(tensors[f"router_idx.{i}"].reshape(1, length, -1).astype(np.int32))
            if kind == "sparse"
            else None
        )
        forced.append(Forced(jnp.asarray(np.where(chosen, order, -1)), experts))

    @jax.jit
    def layers(model, hidden):
        cache = ContiguousCache.create(model.config, 1, length, model.dtype, layered=False)
        step = cache.step(jnp.arange(length)[None])
        return [
            (view.attention_BTD, view.mlp_BTD)
            for view in model.each_layer([h.astype(model.dtype) for h in hidden], cache, step, tuple(forced))
        ]

    hidden = [jnp.asarray(tensors[f"hidden.{i}"]) for i in range(model.config.num_hidden_layers)]
    for i, (attention, mlp) in enumerate(layers(model, hidden)):
        for name, found in (("attn_out", attention), ("mlp_out", mlp)):
            wanted = tensors[f"{name}.{i}"]
            error = np.linalg.norm(np.asarray(found, np.float32) - wanted) / np.linalg.norm(wanted)
            assert error < 0.02, f"layer {i} {name}: relative error {error:.4f} in bf16"
