"""A run learns, keeps routers balanced, and goes on exactly where it stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.model import checkpoint
from glmjax.training import plot
from glmjax.training.export import cast
from glmjax.training.recipe import Recipe, Stage, balance
from glmjax.training.run import Run
from glmjax.training.tasks import Shares

RECIPE = Recipe(
    stages=(
        Stage(6, 4, 16, "dense", mtp_steps=0, shares=Shares()),
        Stage(4, 2, 32, "sparse", mtp_steps=2, shares=Shares()),
    ),
    warmup_steps=2,
    learning_rate=1e-2,
    distilled=4,
    balance_rate=1e-2,
)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def seen(model):
    return {"embedding": float(jnp.abs(model.embed_VD.array).mean())}


def run(folder, config, tokens, recipe=RECIPE):
    return Run(folder, config, recipe, tokens, probe=seen, keep_every=3, probe_every=4, log_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def whole(folder, tiny_config, counting_tokens):
    """A run from start to end; trained once for all tests of this file."""
    trained = run(folder, tiny_config, counting_tokens)
    trained.train()
    return trained


def test_it_learns(whole, folder):
    lines = log(folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["next_token"] < lines[0]["next_token"] - 0.5
    assert [len(line["mtp"]) for line in lines] == [0] * 6 + [2] * 4


def test_interrupted_anywhere_it_goes_on_with_the_same_batches_and_losses(
    whole, folder, tmp_path, tiny_config, counting_tokens
):
    for until in (2, 6, 7, 10):  # within a stage, at its end, in the next
        run(tmp_path, tiny_config, counting_tokens).train(until)
    wanted, found = log(folder), log(tmp_path)
    for a, b in zip(wanted, found, strict=True):
        assert {k: a[k] for k in ("step", "next_token", "mtp", "indexer_kl", "indexer_recall", "grad_norm")} == {
            k: b[k] for k in ("step", "next_token", "mtp", "indexer_kl", "indexer_recall", "grad_norm")
        }
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(Run.resume(tmp_path, tiny_config)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_probe_measures_the_model_now_and_then_and_at_the_end(whole, folder):
    probed = {line["step"]: line["embedding"] for line in log(folder) if "embedding" in line}
    assert list(probed) == [4, 8, 10]
    assert probed[10] == seen(whole.state.model)["embedding"]


def test_the_log_can_be_drawn(whole, folder, tmp_path):
    lines = [line | {"held_out_bits_per_byte": 2.0} for line in log(folder)]
    plot.draw(lines, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.startswith("<?xml")
    plot.draw(lines, tmp_path / "again.svg")
    assert len((tmp_path / "again.svg").read_text()) == len(drawn)


def test_a_folder_keeps_its_recipe(whole, folder, tiny_config, counting_tokens):
    with pytest.raises(ValueError, match="begun with another recipe"):
        run(folder, tiny_config, counting_tokens, Recipe())


def test_a_folder_without_checkpoints_cannot_be_resumed(tmp_path, tiny_config):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Run.resume(tmp_path, tiny_config)


def test_balance_raises_the_bias_of_idle_experts(tiny_model):
    load = jnp.array([[0.4, 0.2, 0.25, 0.15]] * 2)
    moved = balance(tiny_model, load, RECIPE).experts.router_bias_LE.array
    np.testing.assert_allclose(moved[0], [-0.01, 0.01, 0.0, 0.01], atol=1e-9)
    np.testing.assert_array_equal(tiny_model.experts.router_bias_LE.array, 0)


def test_the_exported_model_is_a_checkpoint_that_loads(whole, tmp_path, tiny_config):
    raw = {"model_type": "glm_moe_dsa"} | {k: getattr(tiny_config, k) for k in tiny_config.__dataclass_fields__}
    raw |= {"rope_parameters": {"rope_theta": raw.pop("rope_theta")}, "quantization": None}
    half = cast(whole.state.model, jnp.bfloat16)
    assert half.experts.router_bias_LE.array.dtype == jnp.float32
    checkpoint.save(half, tmp_path, raw)
    again = checkpoint.load(tmp_path, dtype=jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
