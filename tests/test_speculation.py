"""Speculation changes no token, and leaves behind what token-by-token decoding would have."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.glm import GLM, load
from glmjax.model.assemble import abstract
from glmjax.model.cache import Cache, ContiguousCache, last_token
from glmjax.model.config import GlmConfig
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.model.stops import Stops
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source
from glmjax.speculation import DecodeState, begin, prefill, speculate, verify

GOLDEN = Path(__file__).parent / "golden"
CONTEXT, NEW, DRAFTS = 64, 28, 3
PROMPTS = ([3, 9, 4, 1, 5], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [1])  # with the new tokens, all pass index_topk = 8
TINY = dataclasses.replace(GlmConfig.from_dir(Path(__file__).parent / "tiny.json"), vocab_size=16)
PLAIN = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(temperature=1, seed=1),
    "noisy": SamplingParams(temperature=5, seed=2),  # draft and target share the noise: most drafts are accepted
    "truncated": SamplingParams(temperature=2, top_k=6, top_p=0.9, min_p=0.05, seed=3),
    "penalised": SamplingParams(
        temperature=3, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.3, seed=4
    ),
}
IN_TURN = [PLAIN["greedy"], PLAIN["noisy"], PLAIN["penalised"]]  # of one batch


@functools.cache
def tiny() -> GLM:
    """Random weights whose MTP layer goes by the token alone, as the target nearly does: some greedy drafts are right."""
    model = Transformer(TINY, dtype=jnp.float32, rngs=random_source(0))
    width = TINY.hidden_size
    model.mtp.projection_D2D.values.set_value(jnp.stack([jnp.eye(width), jnp.zeros((width, width))], axis=1))
    return GLM(model, None, None, Stops())


@functools.cache
def golden(name: str) -> GLM:
    return load(GOLDEN / name, dtype=jnp.float32)


@functools.cache
def token_by_token(glm: GLM, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    return glm.generate(prompt, params, max_new_tokens=NEW, ignore_eos=True).finish().ids


@jax.jit
def started(model, ids_BT, positions_BT, sampling) -> DecodeState:
    cache = ContiguousCache.create(model.config, ids_BT.shape[0], CONTEXT, model.dtype, mtp=True)
    step = cache.step(positions_BT)
    hidden_BTD, cache = prefill(model, cache, cache.tail_BD, ids_BT, step)
    return begin(model, cache, last_token(step, hidden_BTD, cache.tail_BD), positions_BT.max(axis=1) + 1, sampling)


one_round = jax.jit(speculate, static_argnames="num_draft")


def start(model: Transformer, prompts, params) -> DecodeState:
    """All prompts in one padded chunk."""
    ids, positions = np.zeros((len(prompts), 16), np.int32), np.full((len(prompts), 16), -1, np.int32)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)], positions[b, : len(prompt)] = prompt, np.arange(len(prompt))
    return started(model, ids, positions, SamplingState.from_params(params, prompts, model.config.vocab_size))


def speculated(model: Transformer, state: DecodeState, num_draft: int = DRAFTS, new: int = NEW):
    """Each sequence's tokens, each round's counts, and the last state; a sequence goes idle once it has enough."""
    emitted, counts = [[int(token)] for token in state.token_B], []
    while (np.asarray(state.position_B) >= 0).any():
        out = one_round(model, state, num_draft=num_draft)
        for ids, tokens, count in zip(emitted, out.tokens_BT.tolist(), out.count_B.tolist(), strict=True):
            assert tokens[count:] == [-1] * (num_draft + 1 - count)
            ids += tokens[:count]
        counts.append(out.count_B.tolist())
        full_B = np.array([len(ids) >= new for ids in emitted])
        state = dataclasses.replace(out.state, position_B=jnp.where(full_B, -1, out.state.position_B))
    return emitted, np.array(counts), state


# Nothing is lost


@pytest.mark.parametrize("name", ["shared_indexer", "fp8"])
def test_published_layouts_give_the_tokens_of_token_by_token_decoding(name):
    glm = golden(name)
    found, _, _ = speculated(glm.weights, start(glm.weights, PROMPTS, IN_TURN))
    for ids, prompt, params in zip(found, PROMPTS, IN_TURN, strict=True):
        assert ids[:NEW] == token_by_token(glm, tuple(prompt), params)


@pytest.mark.parametrize("how", PLAIN)
def test_where_drafts_are_accepted_no_token_differs(how):
    glm, params = tiny(), PLAIN[how]
    found, counts, _ = speculated(glm.weights, start(glm.weights, PROMPTS, [params] * 3))
    assert (counts > 1).any()
    for ids, prompt in zip(found, PROMPTS, strict=True):
        assert ids[:NEW] == token_by_token(glm, tuple(prompt), params)


def test_output_does_not_depend_on_whether_one_speculates():
    glm = tiny()
    found, counts, _ = speculated(glm.weights, start(glm.weights, PROMPTS, IN_TURN), num_draft=0)
    assert counts.max() == 1
    for ids, prompt, params in zip(found, PROMPTS, IN_TURN, strict=True):
        assert ids[:NEW] == token_by_token(glm, tuple(prompt), params)


def test_shared_noise_makes_drafts_of_a_flat_distribution_agree():
    model = tiny().weights
    _, noisy, _ = speculated(model, start(model, PROMPTS, [PLAIN["noisy"]] * 3))
    assert noisy[noisy > 0].mean() > 1.5


def test_tokens_of_the_vocabularys_padding_are_never_drawn():
    state = start(tiny().weights, PROMPTS, [PLAIN["noisy"]] * 3)
    barred = jnp.where(jnp.arange(16) % 2 == 0, -jnp.inf, 0.0) + jnp.zeros((3, 16))
    state = dataclasses.replace(state, sampling=dataclasses.replace(state.sampling, bias_BV=barred))
    found, _, _ = speculated(tiny().weights, state)
    assert all(token % 2 == 1 for ids in found for token in ids[1:])


# What a round leaves behind


def test_rows_and_tail_are_those_of_a_prefill_of_what_was_emitted():
    """Also the MTP layer's: provisional rows do not outlive their round."""
    model = tiny().weights
    state, history = start(model, PROMPTS, [PLAIN["noisy"]] * 3), [list(prompt) for prompt in PROMPTS]
    newest = np.asarray(state.token_B).tolist()
    for _ in range(4):
        out = one_round(model, state, num_draft=DRAFTS)
        for ids, token, tokens, count in zip(history, newest, out.tokens_BT, out.count_B, strict=True):
            ids += [token, *tokens[: count - 1].tolist()]
        state, newest = out.state, np.asarray(out.state.token_B).tolist()
    assert max(map(len, history)) > max(map(len, PROMPTS)) + 4  # some were accepted
    for b, ids in enumerate(history):
        assert int(state.position_B[b]) == len(ids)
        padded = np.pad(ids, (0, CONTEXT - len(ids)))[None]
        positions = np.where(np.arange(CONTEXT) < len(ids), np.arange(CONTEXT), -1)[None]
        wanted = started(model, padded, positions, SamplingState.from_params([PLAIN["greedy"]], [()], 16))
        np.testing.assert_allclose(state.tail_BD[b], wanted.tail_BD[0], atol=2e-5)
        for rows, other in [
            (state.cache.latents, wanted.cache.latents),
            (state.cache.index_keys, wanted.cache.index_keys),
        ]:
            found = rows.values_LGAC[:, b, 1 : len(ids)]  # the MTP layer's row 0 is never seen
            np.testing.assert_allclose(found, other.values_LGAC[:, 0, 1 : len(ids)], atol=2e-5)


def test_counts_are_those_of_the_emitted_tokens():
    model = tiny().weights
    found, _, state = speculated(model, start(model, PROMPTS, [PLAIN["noisy"]] * 3))
    wanted = [np.bincount(ids, minlength=16) for ids in found]
    np.testing.assert_array_equal(state.sampling.counts_BV, wanted)


def test_the_logits_are_those_the_tokens_were_drawn_from():
    model = tiny().weights
    out = one_round(model, start(model, PROMPTS, [PLAIN["greedy"]] * 3), num_draft=DRAFTS)
    kept = np.arange(DRAFTS + 1) < np.asarray(out.count_B)[:, None]
    np.testing.assert_array_equal(np.argmax(out.logits_BTV, -1)[kept], out.tokens_BT[kept])
    np.testing.assert_allclose(model.head(out.hidden_BTD), out.logits_BTV, atol=1e-5)


def test_an_idle_slot_passes_through_untouched():
    model = tiny().weights
    state = start(model, PROMPTS, IN_TURN)
    state = dataclasses.replace(state, position_B=state.position_B.at[1].set(-1))
    out = one_round(model, state, num_draft=DRAFTS)
    assert int(out.count_B[1]) == 0
    assert out.tokens_BT[1].tolist() == [-1] * (DRAFTS + 1)
    before, after = (
        [s.tail_BD[1], s.token_B[1], s.position_B[1], s.sampling.counts_BV[1], s.cache.latents.values_LGAC[:, 1]]
        for s in (state, out.state)
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    beside = one_round(model, start(model, PROMPTS, IN_TURN), num_draft=DRAFTS)
    np.testing.assert_array_equal(out.tokens_BT[::2], beside.tokens_BT[::2])


def test_tokens_are_right_up_to_the_end_of_the_cache():
    glm, new = tiny(), CONTEXT - len(PROMPTS[0])
    found, _, _ = speculated(glm.weights, start(glm.weights, PROMPTS, [PLAIN["noisy"]] * 3), new=new)
    wanted = glm.generate(PROMPTS[0], PLAIN["noisy"], max_new_tokens=new, ignore_eos=True).finish().ids
    assert found[0][:new] == wanted


# What it is made for


def test_any_cache_will_do():
    """A round asks a cache for nothing but the protocol."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Foreign:
        inner: ContiguousCache

        capacity = CONTEXT

        def step(self, positions_BT, first_BT=None):
            return self.inner.step(positions_BT, first_BT)

        def append(self, *args):
            return Foreign(self.inner.append(*args))

        def append_index(self, *args):
            return Foreign(self.inner.append_index(*args))

        def select(self, *args):
            return self.inner.select(*args)

        def attend(self, *args, **kwargs):
            return self.inner.attend(*args, **kwargs)

    model, state = tiny().weights, start(tiny().weights, PROMPTS, IN_TURN)
    foreign = dataclasses.replace(state, cache=Foreign(state.cache))
    assert isinstance(foreign.cache, Cache)
    traced = jax.make_jaxpr(lambda m, s: speculate(m, s, num_draft=DRAFTS).tokens_BT)(model, foreign)
    assert traced.out_avals[0].shape == (3, DRAFTS + 1)


def test_the_state_keeps_its_shapes_as_a_loops_must():
    model, state = tiny().weights, start(tiny().weights, PROMPTS, IN_TURN)
    out = one_round(model, state, num_draft=DRAFTS).state
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(out)] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def test_drafts_need_an_mtp_layer():
    model = abstract(TINY, jnp.float32, mtp=False, fp8=False)
    with pytest.raises(ValueError, match="no MTP weights"):
        jax.eval_shape(
            lambda m, s: speculate(m, s, num_draft=1).count_B, model, start(tiny().weights, PROMPTS, IN_TURN)
        )


# What ends a chain


def test_no_more_is_emitted_than_there_is_room_for():
    """And counts, rows and the state are those of the emitted tokens: the next round goes on as if nothing had been."""
    model, rooms = tiny().weights, (2, 0, 5)
    whole, _, _ = speculated(model, start(model, PROMPTS, [PLAIN["penalised"]] * 3))
    state, emitted = start(model, PROMPTS, [PLAIN["penalised"]] * 3), [[], [], []]
    for ids, token in zip(emitted, state.token_B.tolist(), strict=True):
        ids.append(token)
    for n in range(12):
        room_B = jnp.array(rooms[n % 3 :] + rooms[: n % 3])
        out = one_round(model, state, num_draft=DRAFTS, room_B=room_B)
        assert (out.count_B <= room_B).all()
        for ids, tokens, count in zip(emitted, out.tokens_BT.tolist(), out.count_B.tolist(), strict=True):
            ids += tokens[:count]
        state = out.state
    for found, wanted in zip(emitted, whole, strict=True):
        assert len(found) > 8
        assert found[: len(wanted)] == wanted[: len(found)]


def test_nothing_is_emitted_after_a_stop_token():
    model = tiny().weights
    whole, _, _ = speculated(model, start(model, PROMPTS, IN_TURN))
    stops = [ids[9] for ids in whole]
    state, emitted = start(model, PROMPTS, IN_TURN), [[], [], []]
    for b, token in enumerate(state.token_B.tolist()):
        emitted[b].append(token)
    stop_BU = jnp.array([[stop, -1] for stop in stops])
    while (np.asarray(state.position_B) >= 0).any():
        out = one_round(model, state, num_draft=DRAFTS, stop_BU=stop_BU)
        for ids, tokens, count in zip(emitted, out.tokens_BT.tolist(), out.count_B.tolist(), strict=True):
            ids += tokens[:count]
        state = dataclasses.replace(out.state, position_B=jnp.where(out.stopped_B, -1, out.state.position_B))
    for found, wanted, stop in zip(emitted, whole, stops, strict=True):
        end = wanted.index(stop, 1) + 1  # the first token was drawn before any round
        assert found == wanted[:end]


@pytest.mark.parametrize("right", [0, 3, 7])
def test_a_given_chain_is_followed_as_far_as_it_is_right(right):
    model = tiny().weights
    whole, _, _ = speculated(model, start(model, PROMPTS, IN_TURN))
    chain = np.array([ids[:8] for ids in whole], np.int32)
    chain[:, right + 1 :] = (chain[:, right + 1 :] + 1) % TINY.vocab_size
    out = jax.jit(verify)(model, start(model, PROMPTS, IN_TURN), chain)
    assert out.count_B.tolist() == [right + 1] * 3
    for found, wanted in zip(out.tokens_BT.tolist(), whole, strict=True):
        assert found[: right + 1] == wanted[1 : right + 2]
