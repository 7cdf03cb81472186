"""`glmjax.load` and `GLM.forward`: what comes out, and what is refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from glmjax.glm import GLM, Output, load

GOLDEN = Path(__file__).parent / "golden"
WANTED = load_file(GOLDEN / "sparse" / "golden.safetensors")  # by Hugging Face
LENGTH = 48  # beyond index_topk = 8
IDS = np.concatenate([WANTED["input_ids"], np.random.default_rng(0).integers(0, 160, (1, LENGTH))])


@pytest.fixture(scope="module")
def glm() -> GLM:
    return load(GOLDEN / "sparse")


@pytest.fixture(scope="module")
def out(glm) -> Output:
    return glm.forward(IDS, trace=True)


@pytest.fixture(scope="module")
def shared() -> Output:
    """Of layers that share selections, and without MTP weights."""
    return load(GOLDEN / "shared_indexer", mtp=False).forward(IDS[:, :14], trace=True)


@pytest.fixture(scope="module")
def single() -> Output:
    """Of a single token, without a trace, in bfloat16."""
    return load(GOLDEN / "sparse", dtype="bfloat16").forward(IDS[:1, :1])


# Loading


def test_a_directory_without_a_tokenizer_gives_a_model_of_ids(glm):
    assert glm.tokenizer is None
    assert glm.chat_template is None
    assert glm.config.vocab_size == 160
    assert glm.stops.token_ids == {1}


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_a_directory_without_a_model_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / name)):
        load(tmp_path / name)


def test_a_tokenizer_that_is_asked_for_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no tokenizer.json in {tmp_path}"):
        load(GOLDEN / "sparse", tokenizer_path=tmp_path)


def test_only_float32_and_bfloat16_are_computed_in():
    with pytest.raises(ValueError, match="dtype is float16"):
        load(GOLDEN / "sparse", dtype="float16")


# Forward


def test_the_first_sequence_is_as_hugging_face_has_it(out):
    np.testing.assert_allclose(out.logits_BTV[:1], WANTED["logits"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(out.mtp_logits_BTV[:1], WANTED["mtp_logits"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(out.hidden_BTD[:1], WANTED["hidden.final"], rtol=0, atol=5e-5)


def test_shapes_and_dtypes(out):
    assert out.logits_BTV.shape == (2, LENGTH, 160)
    assert out.hidden_BTD.shape == (2, LENGTH, 64)
    assert out.mtp_logits_BTV.shape == (2, LENGTH - 1, 160)
    assert out.logits_BTV.dtype == out.mtp_logits_BTV.dtype == out.hidden_BTD.dtype == jnp.float32


def test_a_single_token_has_logits_and_no_mtp_slot(single):
    assert single.logits_BTV.shape == (1, 1, 160)
    assert single.mtp_logits_BTV.shape == (1, 0, 160)


def test_logits_of_a_bfloat16_model_are_float32(single, out):
    assert (single.logits_BTV.dtype, single.hidden_BTD.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(single.logits_BTV[0, 0], out.logits_BTV[0, 0], atol=0.2)


def test_without_mtp_weights_there_are_no_mtp_logits(shared):
    assert shared.mtp_logits_BTV is None


def test_a_trace_comes_only_when_asked_for(single):
    assert single.trace is None


def test_an_mtp_slot_sees_one_token_more_than_the_logits_beside_it(glm, out):
    changed = IDS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 160
    after = glm.forward(changed, trace=True)
    moved = np.abs(np.asarray(out.logits_BTV - after.logits_BTV)).max(axis=(0, 2)) > 1e-4
    assert moved.argmax() == 6
    moved = np.abs(np.asarray(out.mtp_logits_BTV - after.mtp_logits_BTV)).max(axis=(0, 2)) > 1e-4
    assert moved.argmax() == 5


def test_sequences_of_a_batch_do_not_see_each_other(glm, out):
    for b in range(2):
        alone = glm.forward(IDS[b : b + 1], trace=True)
        np.testing.assert_allclose(out.logits_BTV[b], alone.logits_BTV[0], rtol=0, atol=2e-5)
        np.testing.assert_allclose(out.mtp_logits_BTV[b], alone.mtp_logits_BTV[0], rtol=0, atol=2e-5)
        for mine, its in zip(out.trace.selected, alone.trace.selected, strict=True):
            np.testing.assert_array_equal(mine[b], its[0])


@pytest.mark.parametrize("make", [np.ndarray.tolist, jnp.asarray, lambda ids: ids.astype(np.uint8)])
def test_ids_may_be_lists_or_arrays_of_any_integers(glm, out, make):
    np.testing.assert_array_equal(glm.forward(make(IDS), trace=True).logits_BTV, out.logits_BTV)


# The trace


def test_selections_ascend_with_nothing_after_them(out):
    assert len(out.trace.selected) == 5
    for selected in out.trace.selected:
        assert selected.shape == (2, LENGTH, 8)
        assert selected.dtype == np.int32
        for t in range(LENGTH):
            for row in selected[:, t]:
                chosen = row[row >= 0]
                assert len(chosen) == min(t + 1, 8)
                assert (row[len(chosen) :] == -1).all()
                assert (np.diff(chosen) > 0).all()
                assert chosen.max() <= t


def test_layers_that_share_repeat_the_full_layers_selection(shared):
    kinds = json.loads((GOLDEN / "shared_indexer" / "config.json").read_text())["indexer_types"]
    selected = shared.trace.selected
    assert {*kinds} == {"full", "shared"}
    for layer, kind in enumerate(kinds):
        if kind == "shared":
            np.testing.assert_array_equal(selected[layer], selected[layer - 1])
    full = [rows for rows, kind in zip(selected, kinds, strict=True) if kind == "full"]
    assert not np.array_equal(full[0], full[1])


def test_experts_are_those_of_sparse_layers(out):
    experts = out.trace.experts
    assert [choice is None for choice in experts] == [True, True, False, False, False]
    for choice in experts[2:]:
        assert choice.shape == (2, LENGTH, 2)
        assert (choice >= 0).all()
        assert (choice < 8).all()
        assert (choice[..., 0] != choice[..., 1]).all()


# What is refused


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"ids_BT has shape \(0,\)"),
        ([[]], r"ids_BT has shape \(1, 0\)"),
        ([1, 2, 3], r"ids_BT has shape \(3,\); give \[sequences, tokens\]"),
        ([[[1]]], r"ids_BT has shape \(1, 1, 1\)"),
        ([[1, 2], [3]], "equally long"),
        ([[1.0, 2.0]], "token ids are float64; they must be integers"),
        ([[True]], "token ids are bool; they must be integers"),
        ([[5, 160]], r"token id 160 is outside the vocabulary, 0\.\.159"),
        ([[5, -1]], "token id -1 is outside the vocabulary"),
        ([[2**40]], "token id 1099511627776 is outside"),
    ],
    ids=str,
)
def test_bad_ids_are_refused(glm, ids, message):
    with pytest.raises(ValueError, match=message):
        glm.forward(ids)


def test_sequences_beyond_the_context_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "sparse", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": LENGTH - 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{LENGTH} tokens exceed the model's context of {LENGTH - 1}"):
        load(tmp_path).forward(IDS)
