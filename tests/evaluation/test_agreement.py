"""Nothing differs from itself, and what differs is measured as defined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.evaluation.agreement import Agreement, agreement
from glmjax.evaluation.rows import scored_rows
from glmjax.glm import load

IDS = np.random.default_rng(0).integers(4, 98, 33).astype(np.int32)
ROWS = list(scored_rows([IDS], 1, batch_size=1, seq_len=33, context=16))


@pytest.fixture(scope="module")
def half(directory):
    return load(directory, dtype="bfloat16")


@pytest.fixture(scope="module")
def found(glm, half):
    return agreement(glm.weights, half.weights, ROWS)


def test_a_model_agrees_with_itself(glm):
    found = agreement(glm.weights, glm.weights, ROWS)
    assert found == (33, 0.0, 0.0, 1.0, 0.0)


def test_it_is_the_divergence_of_the_forwards_distributions(glm, half, found):
    """Of all tokens but the first, which is predicted from the end token alone."""
    p, q = (jax.nn.log_softmax(model.forward([IDS]).logits_BTV[0]) for model in (glm, half))
    kl = (jnp.exp(p) * (p - q)).sum(-1)
    assert found.tokens == 33
    assert found.largest_kl >= 0.9 * float(kl[:-1].max())
    assert found.kl == pytest.approx(float(kl[:-1].mean()), rel=0.2)
    assert 0 < found.kl < 0.1
    assert 0.5 < found.top_1 <= 1


def test_narrower_rows_alone_make_a_difference(glm):
    narrow = agreement(glm.weights, glm.weights, ROWS, "bfloat16")
    assert 0 < narrow.kl < 0.1


def test_the_report_says_what_was_compared(directory, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n" * 5)
    shape = {"files": (tmp_path / "a.py",), "seq_len": 33, "batch_size": 1}
    report = Agreement(directory, **shape).run()
    assert report.text.startswith("bfloat16, rows cached in bfloat16, against float32, over 30 tokens in rows of 33\n")
    assert report.numbers["kv_cache_dtype"] == "bfloat16"
    assert [line.split("  ")[0] for line in report.text.splitlines()[1:]] == [
        "mean KL(float32 ‖ it)", "largest KL", "same most likely token", "loss",
    ]  # fmt: skip
