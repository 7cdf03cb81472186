"""Bits per byte are those of the forward's own probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.evaluation import text
from glmjax.evaluation.rows import scored_rows
from glmjax.evaluation.text import Score, Text, total_nll
from glmjax.model.transformer import densely
from glmjax.training import corpus
from glmjax.training.corpus import Corpus, Document

SHAPE = {"seq_len": 32, "batch_size": 4}
IDS = np.random.default_rng(0).integers(4, 98, 20).astype(np.int32)


def rows(*documents, seq_len=32):
    return list(scored_rows(documents, 1, batch_size=4, seq_len=seq_len, context=seq_len // 2))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.py").write_text("x = 1\n" * 15)
    (folder / "b.py").write_text("def f():\n    return <eos>\n")  # not a control token here
    return folder / "a.py", folder / "b.py"


@pytest.fixture(scope="module")
def both(directory, files):
    return Text(directory, files=files, attention=("sparse", "dense"), **SHAPE).run()


def test_it_is_the_sum_of_the_forwards_log_probabilities(glm):
    """The first token's is given the end token alone, and the end token is no context for the others."""
    logits = jnp.concatenate([glm.forward([[1] * 20]).logits_BTV[0, :1], glm.forward([IDS]).logits_BTV[0, :-1]])
    wanted = -jax.nn.log_softmax(logits)[np.arange(20), IDS].sum()
    assert total_nll(glm.weights, rows(IDS)) == pytest.approx(float(wanted), abs=1e-3)


def test_documents_add_up(glm):
    one, other = total_nll(glm.weights, rows(IDS)), total_nll(glm.weights, rows(IDS[::-1]))
    assert total_nll(glm.weights, rows(IDS, IDS[::-1])) == pytest.approx(one + other, abs=1e-3)


def test_dense_attention_sees_more_than_the_selection(glm):
    """Up to index_topk = 8 tokens of context it is the same model; beyond, not."""
    dense = densely(glm.weights)
    assert total_nll(dense, rows(IDS[:7])) == pytest.approx(total_nll(glm.weights, rows(IDS[:7])), abs=1e-4)
    assert total_nll(dense, rows(IDS)) != pytest.approx(total_nll(glm.weights, rows(IDS)), abs=1e-4)


def test_a_uniform_model_over_bytes_needs_eight_bits_a_byte():
    score = Score(nll=100 * math.log(256), tokens=100, num_bytes=100)
    assert score.bits_per_byte == pytest.approx(8)
    assert score.perplexity == pytest.approx(256)
    assert Score(nll=1.0, tokens=50, num_bytes=100).tokens_per_byte == 0.5


def test_the_report_has_both_attentions_and_their_difference(both):
    numbers = both.numbers
    assert (numbers["texts"], numbers["bytes"], numbers["tokens"]) == (2, 116, 116)
    sparse, dense = numbers["attention"]["sparse"], numbers["attention"]["dense"]
    assert sparse["bits_per_byte"] == pytest.approx(sparse["loss"] / math.log(2))  # a byte is a token here
    assert numbers["dense_against_sparse"] == pytest.approx(dense["loss"] / sparse["loss"] - 1)
    lines = both.text.splitlines()
    assert lines[0] == "2 texts, 116 bytes, 116 tokens (1.0000 per byte), in rows of 32"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["sparse attention", "dense attention", "xz -9"]
    assert lines[5].startswith("dense against sparse: ")


def test_held_out_modules_come_with_xz_after_the_training_files(directory, monkeypatch):
    held_out = (Document("a.py", "value = 12345\n" * 4),)
    monkeypatch.setattr(corpus, "load", lambda: Corpus(held_out, held_out, {}))
    report = Text(directory, stdlib=True, **SHAPE).run()
    plain, after = report.numbers["compressed"].values()
    assert after["bytes"] < plain["bytes"]
    assert "xz -9 after the training files" in report.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give files to measure on, or --stdlib"),
        ({"files": True, "stdlib": True}, "give files to measure on, or --stdlib"),
        ({"files": True, "seq_len": 513}, "rows of 513 tokens, 4 at a time, cannot be; the model's context is 512"),
        ({"files": True, "batch_size": 0}, "rows of 32 tokens, 0 at a time"),
        ({"files": True, "attention": ("dense", "dense")}, "each once"),
        ({"files": "binary"}, "binary is not UTF-8 at byte 1"),
        ({"files": "empty"}, "the texts are empty"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(directory, files, tmp_path, arguments, message):
    (tmp_path / "binary").write_bytes(b"a\xff")
    (tmp_path / "empty").touch()
    chosen = arguments.get("files", ())
    chosen = files if chosen is True else (tmp_path / chosen,) if chosen else ()
    with pytest.raises(ValueError, match=message):
        Text(directory, **SHAPE | arguments | {"files": chosen}).run()


def test_a_checkpoint_without_a_tokenizer_is_refused(directory, files, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(directory / name)
    with pytest.raises(ValueError, match="--tokenizer-path"):
        Text(tmp_path, files=files, **SHAPE).run()
    assert text.Text(tmp_path, tokenizer_path=directory, files=files, **SHAPE).run().numbers["tokens"] == 116
