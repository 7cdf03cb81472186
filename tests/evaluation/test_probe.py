"""What a training run measures of a model it is training."""

import pytest

import glmjax
from glmjax.evaluation.probe import Probe
from glmjax.training import corpus


def test_a_sample_of_the_held_out_modules_in_bits_per_byte():
    glm = glmjax.load(dtype="float32")
    found = Probe(corpus.load().held_out, glm.tokenizer, batches=2, seq_len=128)(glm.weights)
    assert list(found) == ["held_out_bits_per_byte"]
    assert found["held_out_bits_per_byte"] == pytest.approx(1.9, abs=0.7)  # whole modules in longer rows: 1.73
