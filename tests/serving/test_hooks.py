"""Hooks look at and change chosen requests, each token once; whoever is not chosen notices nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.model.cache import whole_sequences
from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.compiled import Programs
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from glmjax.serving.hooks import Hooked, Hooks, selected
from glmjax.serving.pages import PagedCache
from glmjax.serving.recorder import load
from glmjax.serving.replay import Replay
from glmjax.serving.running import MOST_RETIRED
from glmjax.serving.scheduler import STOP_IDS
from glmjax.serving.shapes import Shape
from glmjax.serving.slots import Slots
from tests.serving.tiny import CONFIG as MODEL
from tests.serving.tiny import tiny

CONFIG = EngineConfig(
    max_model_len=64,
    max_num_seqs=3,
    page_size=8,
    pages=14,
    chunk_tokens=16,
    num_draft=2,
    adapts_draft=False,
    max_rounds=6,
    offload_bytes=1 << 24,
    debug=True,
)
DIRECTIONS = np.float32(np.random.default_rng(0).standard_normal((3, MODEL.hidden_size)))
DIRECTIONS[0] = 1e6  # of nobody: would be noticed
GREEDY = {"temperature": 0, "max_new_tokens": 20}


def capture(view):
    return {
        "hidden": view.hidden_BTD,
        "selected": selected(view, MODEL.index_topk),
        "experts": view.choice_BTX,
        "positions": view.step.positions_BT,
    }


def patch(view, hook_BT):
    """In layer 0 a direction is added, another one for every treatment."""
    steered_BTD = view.hidden_BTD + jnp.asarray(DIRECTIONS)[hook_BT]
    return jnp.where(view.index.layer == 0, steered_BTD, view.hidden_BTD)


def prompt(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, 16, length).tolist())


@functools.cache
def _forward(hook):
    """All of a sequence at once, with the hooks."""

    @jax.jit
    def run(ids_BT):
        model = Hooked(tiny().weights, Hooks(capture, patch if hook else None), jnp.full(1, hook))
        cache, step = whole_sequences(MODEL, ids_BT, jnp.float32)
        out = model.backbone(ids_BT, cache, step)
        return model.head(out.hidden_BTD)[0], jax.tree.map(lambda leaf: leaf[0], out.observed)

    return run


def forward(ids, hook=0):
    """Logits [T, V] and captures, by layer; in one shape, for one program."""
    padded = np.zeros((1, CONFIG.max_model_len), np.int32)
    padded[0, : len(ids)] = ids
    logits, observed = _forward(hook)(padded)
    return np.asarray(logits)[: len(ids)], jax.tree.map(lambda leaf: np.asarray(leaf)[: len(ids)], observed)


def greedy(ids, result, hook=0):
    """Whether a greedy result is the most likely continuation, under a treatment."""
    logits, _ = forward((*ids, *result.ids), hook)
    return logits[len(ids) - 1 : -1].argmax(-1).tolist() == list(result.ids)


def same(found, ids, hook=0):
    """Captures beside those of one forward over all tokens."""
    _, wanted = forward(ids, hook)
    at = found.positions
    for layer, of in found.layers.items():
        for name in ("selected", "experts", "positions"):
            if of[name] is not None:
                np.testing.assert_array_equal(of[name], wanted[layer][name][at], err_msg=f"{name} of layer {layer}")
        np.testing.assert_allclose(of["hidden"], wanted[layer]["hidden"][at], atol=1e-4)


@pytest.fixture(scope="module")
def engine():
    with Engine(tiny(), CONFIG, hooks=Hooks(capture, patch)) as engine:
        yield engine


# Patches


@pytest.mark.parametrize("hook", [1, 2])
def test_a_chosen_request_is_steered_in_every_token(engine, hook):
    """Prompt and new tokens, through chunks, drafts and rounds."""
    [result] = engine.generate(prompt(21), hook=hook, **GREEDY).finish()
    assert greedy(prompt(21), result, hook)
    assert not greedy(prompt(21), result)


def test_who_is_not_chosen_gets_what_generate_gives(engine):
    """With steered requests beside it, which do not."""
    fields = {"temperature": 1.0, "seed": 3, "max_new_tokens": 20, "use_cache": False}
    streams = [engine.generate(prompt(9 + n, n), hook=n, **fields) for n in range(3)]
    found = [stream.finish()[0].ids for stream in streams]
    alone = [tuple(tiny().generate(prompt(9 + n, n), **fields_of(fields)).finish().ids) for n in range(3)]
    assert [ids == reference for ids, reference in zip(found, alone, strict=True)] == [True, False, False]


def fields_of(fields):
    return {name: value for name, value in fields.items() if name != "use_cache"}


def test_in_one_program_others_are_the_same_to_the_last_bit():
    @jax.jit
    def hidden(ids_BT, hook_B):
        model = tiny().weights if hook_B is None else Hooked(tiny().weights, Hooks(capture, patch), hook_B)
        cache, step = whole_sequences(MODEL, ids_BT, jnp.float32)
        return model.backbone(ids_BT, cache, step).hidden_BTD

    ids_BT = np.int32([prompt(40, n) for n in range(3)])
    plain, steered = hidden(ids_BT, None), hidden(ids_BT, np.int32([0, 1, 0]))
    np.testing.assert_array_equal(plain[::2], steered[::2])
    assert np.abs(plain[1] - steered[1]).max() > 0.1


def test_nothing_is_compiled_for_a_treatment(engine):
    before = engine.stats().programs
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        for hook in (0, 1, 2):
            engine.generate(prompt(30, 7), hook=hook, **GREEDY).finish()
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled == []
    assert engine.stats().programs == before


# Captures


@pytest.mark.parametrize("length", [1, 8, 16, 37])
def test_every_token_that_is_read_is_captured_once(engine, length):
    stream = engine.generate(prompt(length, 1), hook=1, use_cache=False, **GREEDY)
    [result] = stream.finish()
    assert result.statistics.accepted < result.statistics.drafted  # drafts were rejected, and are not shown
    found = stream.captures()
    assert found.positions.tolist() == list(range(length + len(result.ids) - 1))
    assert found.layers.keys() == {0, 1}
    assert found.layers[0]["experts"] is None
    assert isinstance(found.layers[1]["experts"], np.ndarray)
    same(found, (*prompt(length, 1), *result.ids), hook=1)


def test_what_is_cached_is_not_read_and_not_captured(engine):
    for cached in (0, 32):
        stream = engine.generate(prompt(37, 2), hook=1, **GREEDY)
        [result] = stream.finish()
        assert result.statistics.cached_tokens == cached
        found = stream.captures()
        assert found.positions.tolist() == list(range(cached, 37 + len(result.ids) - 1))
        same(found, (*prompt(37, 2), *result.ids), hook=1)


def test_nobody_else_is_captured(engine):
    stream = engine.generate(prompt(20), **GREEDY)
    stream.finish()
    assert stream.captures().positions.tolist() == []
    assert stream.captures().layers == {}


def test_a_stop_token_and_several_sequences(engine):
    """Each sequence has its own captures; after the last token that counts there are none."""
    [whole] = engine.generate(prompt(12), hook=2, **GREEDY).finish()
    stop = whole.ids[5]
    stream = engine.generate(prompt(12), n=2, hook=2, use_cache=False, **GREEDY, stop_token_ids=(stop,))
    for index, result in enumerate(stream.finish()):
        assert result.ids == whole.ids[: whole.ids.index(stop) + 1]
        found = stream.captures(index)
        assert found.positions.tolist() == list(range(12 + len(result.ids) - 1))


def test_preempted_requests_are_captured_once(engine):
    """There are pages for less than two of them."""
    asked = [(prompt(14, n), n % 3) for n in range(6)]
    fields = {"temperature": 0, "max_new_tokens": 45, "use_cache": False}
    streams = [engine.generate(ids, hook=hook, **fields) for ids, hook in asked]
    before = engine.stats()
    for (ids, hook), stream in zip(asked, streams, strict=True):
        [result] = stream.finish()
        assert greedy(ids, result, hook)
        wanted = range(14 + len(result.ids) - 1) if hook else range(0)
        assert stream.captures().positions.tolist() == list(wanted)
        same(stream.captures(), (*ids, *result.ids), hook)
    assert engine.stats().preemptions > before.preemptions


def test_suspected_requests_are_confirmed_under_their_treatment(engine, monkeypatch):
    always = AnomalyRules(shortest_length=3.0, largest_rate=0.0, least_tokens=0, window=8)
    monkeypatch.setattr(engine, "config", dataclasses.replace(CONFIG, anomalies=always))
    before = engine.stats()
    stream = engine.generate(prompt(14), hook=1, temperature=0, max_new_tokens=45)
    [result] = stream.finish()
    assert engine.stats().benign > before.benign
    assert engine.stats().aborts == 0
    assert greedy(prompt(14), result, 1)
    assert stream.captures().positions.tolist() == list(range(14 + len(result.ids) - 1))


def test_some_layers_are_kept_and_no_patch_shares_pages_with_everybody():
    hooks = Hooks(lambda view: view.hidden_BTD, layers=(1,))
    config = dataclasses.replace(CONFIG, offload_bytes=0, num_draft=0, max_num_seqs=1, chunk_tokens=8)
    with Engine(tiny(), config, hooks=hooks) as engine:
        [before] = engine.generate(prompt(33), **GREEDY).finish()
        stream = engine.generate(prompt(33), hook=True, **GREEDY)
        [result] = stream.finish()
    assert result.ids == before.ids
    assert result.statistics.cached_tokens == 32
    assert stream.captures().layers.keys() == {1}
    assert stream.captures().layers[1].shape == (len(stream.captures().positions), MODEL.hidden_size)


# Pages


def test_pages_are_shared_within_a_treatment_only(engine):
    ids, cached, fields = prompt(33, 11), {}, GREEDY | {"max_new_tokens": 5}
    for hook in (0, 1, 2, 0, 1, 2):
        [result] = engine.generate(ids, hook=hook, **fields).finish()
        assert greedy(ids, result, hook)
        cached.setdefault(hook, []).append(result.statistics.cached_tokens)
    assert cached == {0: [0, 32], 1: [0, 32], 2: [0, 32]}
    [result] = engine.generate(ids, hook=1, cache_salt="another", **fields).finish()
    assert result.statistics.cached_tokens == 0


def test_a_recording_is_replayed_under_the_same_hooks(engine, tmp_path):
    for n in range(20):
        engine.generate(prompt(40, n % 5), hook=n % 3, **GREEDY).finish()
        engine._offload.flush()
    assert engine.stats().landed > 0
    engine.record(tmp_path / "flight.json.gz")
    header, recordings = load(tmp_path / "flight.json.gz")
    parts = list(Replay(tiny(), header, engine.hooks).run(recordings[-1]))
    assert sum(len(again.tokens) for again in parts) > 100
    assert all(again.same for again in parts)
    with pytest.raises(ValueError, match="recorded with hooks"):
        Replay(tiny(), header)


# Programs


def test_without_hooks_programs_are_what_they_are_without_this_module():
    """The same text as that of the functions given nothing of hooks; and with hooks another one."""
    glm, shapes = tiny(), (Shape("read", 1, 16, 8), Shape("decode", 1, 3, 8), Shape("verify", 1, 8, 8))
    cache = PagedCache.create(MODEL, 8, 8, jnp.float32, tail_dtype=jnp.float32, mtp=True)
    slots = Slots.create(1, MODEL.hidden_size, MODEL.vocab_size, jnp.float32)
    sizes = {"most_rounds": 6, "most_retired": MOST_RETIRED, "stop_ids": STOP_IDS}
    for shape in shapes:
        without, given = (
            Programs(glm.weights, hooks=hooks, **sizes)._lowered(shape, cache, slots)
            for hooks in (None, Hooks(capture, patch))
        )
        assert len(jax.tree.leaves(given.in_avals)) == len(jax.tree.leaves(without.in_avals)) + 1
        assert len(jax.tree.leaves(without.out_info)) < len(jax.tree.leaves(given.out_info))
        assert "hook" not in without.as_text()


# What cannot be


def test_a_request_cannot_choose_what_the_engine_has_not(engine, monkeypatch):
    monkeypatch.setattr(engine, "hooks", None)
    with pytest.raises(ValueError, match="hook is 1 and the engine has no hooks"):
        engine.generate(prompt(3), hook=1)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (Hooks(capture=lambda view: view.hidden_BTD[0]), r"must begin with \[B, T\]"),
        (Hooks(patch=lambda view, hook_BT: view.hidden_BTD[..., :1]), "must keep"),
        (Hooks(capture=lambda view: view.hidden_BTD, layers=(2,)), r"layers \[2\]: the model has layers 0..1"),
    ],
    ids=["capture", "patch", "layers"],
)
def test_hooks_of_the_wrong_shape_are_refused_when_the_engine_is_made(hooks, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny(), CONFIG, hooks=hooks)
