"""Sampling: each rule against a reference in NumPy, the Gumbel rule against the softmax, and what may be asked for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from glmjax.model.sampling import gumbel_noise, logprobs, observe, process, sample
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState

V, B = 50, 4
INF, NAN = math.inf, math.nan
process_jit, sample_jit, observe_jit = jax.jit(process), jax.jit(sample), jax.jit(observe)
noise_jit, logprobs_jit = jax.jit(gumbel_noise, static_argnums=2), jax.jit(logprobs, static_argnums=2)


def params(**asked) -> SamplingParams:
    return SamplingParams(**{"seed": 0, **asked})


def state_of(*asked: SamplingParams, prompts=None, outputs=None, vocab: int = V) -> SamplingState:
    """State of slots with these prompts that have emitted these tokens."""
    state = SamplingState.from_params(asked, prompts or [()] * len(asked), vocab)
    for slot, output in enumerate(outputs or []):
        for token in output:
            state = observe_jit(state, np.full(len(asked), token, np.int32), np.arange(len(asked)) == slot)
    return state


def processed(logits, prompt=(), output=(), **asked) -> np.ndarray:
    """`process` for one slot, in a vocabulary of 8 whose other tokens are impossible (so that it is compiled once)."""
    logits_BV = np.full((1, 8), -INF, np.float32)
    logits_BV[0, : len(logits)] = logits
    state = state_of(params(**asked), prompts=[prompt], outputs=[output], vocab=8)
    return np.asarray(process_jit(logits_BV, state))[0, : len(logits)]


def kept(logits, **asked) -> list[int]:
    return np.flatnonzero(processed(logits, **asked) > -INF).tolist()


# The reference: one row, float64, plain loops over lists of tokens.


def reference_penalised(logits, asked: SamplingParams, prompt, output) -> np.ndarray:
    row = np.array(logits, np.float64)
    for token in {*prompt, *output}:
        row[token] = row[token] / asked.repetition_penalty if row[token] > 0 else row[token] * asked.repetition_penalty
    for token in output:
        row[token] -= asked.frequency_penalty
    for token in set(output):
        row[token] -= asked.presence_penalty
    for token, bias in asked.logit_bias.items():
        row[token] += bias
    return row


def reference_kept(row: np.ndarray, asked: SamplingParams) -> tuple[set[int], float]:
    """The tokens that survive, and how near the closest decision was to going the other way."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if asked.top_k > 0:
        order = order[: asked.top_k]
    mass = {token: math.exp((row[token] - row[order[0]]) / asked.temperature) for token in order}
    total, margin = sum(mass.values()), INF
    if asked.top_p < 1:
        before, survivors = 0.0, []
        for token in order:
            margin = min(margin, abs(before / total - asked.top_p))
            if survivors and before / total >= asked.top_p:
                break
            survivors.append(token)
            before += mass[token]
        order = survivors
    if asked.min_p > 0:
        margin = min([margin, *(abs(mass[token] - asked.min_p) for token in order)])
        order = [token for token in order if mass[token] >= asked.min_p]
    return set(order), margin


# As dictionaries, for beartype draws random numbers while it checks, which Hypothesis forbids in strategies.
# Dyadic numbers: penalties and biases are exact in float32, so that ties in the reference are ties here and vice versa.
ASKED = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.3, 4.0]),
        "top_k": st.one_of(st.sampled_from([0, -1, V, V + 7]), st.integers(1, V)),
        "top_p": st.one_of(st.just(1.0), st.floats(1e-3, 0.999)),
        "min_p": st.one_of(st.just(0.0), st.floats(1e-4, 0.9)),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 2.0, 4.0]),
        "frequency_penalty": st.integers(-8, 8).map(lambda n: n / 4),
        "presence_penalty": st.integers(-8, 8).map(lambda n: n / 4),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.integers(-400, 400).map(lambda n: n / 4), max_size=4),
    }
)
TOKENS = st.lists(st.integers(0, V - 1), max_size=8)


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(ASKED, min_size=B, max_size=B),
    prompts=st.lists(TOKENS, min_size=B, max_size=B),
    outputs=st.lists(TOKENS, min_size=B, max_size=B),
    rng=st.integers(0, 2**32 - 1).map(np.random.default_rng),
    step=st.sampled_from([1 / 4, 2**-20]),  # many ties, or hardly any
)
def test_process_applies_every_rule_in_the_documented_order(asked, prompts, outputs, rng, step):
    asked = [params(**ask) for ask in asked]
    logits_BV = np.round(rng.normal(0, 3, (B, V)) / step) * step
    logits_BV[rng.random((B, V)) < 0.1] = -INF
    logits_BV[:, 0] = 1.0  # at least one token is possible
    actual_BV = np.asarray(
        process_jit(jnp.asarray(logits_BV, jnp.float32), state_of(*asked, prompts=prompts, outputs=outputs))
    )
    for actual, logits, ask, prompt, output in zip(actual_BV, logits_BV, asked, prompts, outputs, strict=True):
        expected = reference_penalised(logits, ask, prompt, output)
        if ask.temperature > 0:
            survivors, margin = reference_kept(expected, ask)
            assume(margin > 1e-5)
            excluded = [token for token in range(V) if token not in survivors]
            expected = (expected - expected.max()) / ask.temperature
            expected[excluded] = -INF
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# Each rule by itself.


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output():
    logits = [2.0, -2.0, 2.0, -2.0, 2.0]
    actual = processed(logits, prompt=(0, 1, 1), output=(3, 0), repetition_penalty=2.0, temperature=0)
    np.testing.assert_array_equal(actual, [1.0, -4.0, 2.0, -4.0, 2.0])


def test_frequency_and_presence_penalties_count_the_output_only():
    asked = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "temperature": 0}
    actual = processed([1.0, 1.0, 1.0], prompt=(2, 2), output=(0, 1, 1), **asked)
    np.testing.assert_array_equal(actual, [0.25, -0.25, 1.0])


def test_logit_bias_is_added_after_the_penalties():
    actual = processed([4.0, 4.0], prompt=(0,), repetition_penalty=2.0, logit_bias={0: 3, 1: -100}, temperature=0)
    np.testing.assert_array_equal(actual, [5.0, -96.0])


def test_temperature_divides_and_the_largest_becomes_zero():
    np.testing.assert_array_equal(processed([3.0, 1.0, -INF], temperature=0.5), [0.0, -4.0, -INF])


def test_top_k_tie_keeps_the_lowest_ids():
    assert kept([1.0, 2.0, 1.0, 1.0, 0.0], top_k=3) == [0, 1, 2]
    assert kept([0.0, -0.0, 0.0], top_k=2) == [0, 1]


def test_top_k_of_zero_minus_one_or_more_than_the_vocabulary_is_off():
    for k in (0, -1, 8, 9, 2**31 - 1):
        assert kept(range(8), top_k=k) == list(range(8))


def test_top_k_ranks_before_temperature_can_round_logits_together():
    apart = [1.0, np.nextafter(np.float32(1), np.float32(2)), 40.0]
    assert kept(apart, top_k=2) == [1, 2]
    assert kept(apart, top_k=2, temperature=1e30) == [1, 2]


def test_top_p_keeps_the_token_that_crosses_it_and_no_more():
    halves = np.log([0.5, 0.25, 0.125, 0.125])
    assert kept(halves, top_p=0.6) == [0, 1]
    assert kept(halves, top_p=0.8) == [0, 1, 2]
    assert kept(halves[::-1], top_p=0.4) == [3]


def test_top_p_reached_exactly_is_enough():
    for p, count in ((0.25, 2), (0.5, 4), (0.5001, 5), (0.875, 7)):
        assert kept([1.0] * 8, top_p=p) == list(range(count))


def test_top_p_counts_mass_among_the_tokens_that_top_k_left():
    assert kept([0.0, 0.0, 0.0, 0.0], top_k=2, top_p=0.5) == [0]
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.5) == [0, 1]


def test_tiny_top_p_keeps_the_most_likely_token():
    for p in (1e-6, 1e-37):
        assert kept([1.0, 3.0, 3.0], top_p=p) == [1]


def test_min_p_is_relative_to_the_most_likely_token():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits, min_p=0.6) == [0, 1]
    assert kept(logits, min_p=0.2) == [0, 1, 2, 3]
    assert kept([2.0, 1.0, 2.0], min_p=1) == [0, 2]  # not unlikelier than the most likely


def test_greedy_slots_are_not_scaled_or_truncated():
    logits = [3.0, 5.0, 4.0]
    np.testing.assert_array_equal(processed(logits, temperature=0, top_k=1, top_p=0.1, min_p=0.9), logits)


# Corners.


def test_a_vocabulary_of_one_token():
    for asked in ({}, {"top_p": 0.1}, {"temperature": 0}):
        state = state_of(params(**asked), vocab=1)
        assert sample_jit(jnp.full((1, 1), -7.0), state, jnp.zeros(1, jnp.int32)).tolist() == [0]
    reported = logprobs_jit(jnp.full((1, 1), -7.0), jnp.zeros(1, jnp.int32), 1)
    assert [np.asarray(x).ravel().tolist() for x in reported] == [[0.0], [1], [0], [0.0]]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 1e-30},
        {"temperature": 1e-300},
        {"temperature": 1e30},
        {"top_k": 2},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30},
        {"logit_bias": {0: 3e38, 1: -3e38, 2: 3e38}},
        {"temperature": 0},
    ],
)
def test_extreme_logits_never_become_nan_and_a_possible_token_is_drawn(asked):
    big = 3e38
    rows = [[1e30, -1e30, 0.0, -INF], [-INF, -INF, -INF, 0.0], [-INF, -INF, big, -big], [-big, -big, -big, -big]]
    for row in rows:
        actual = processed(row, prompt=(0, 1), output=(2, 2), **asked)
        assert not np.isnan(actual).any()
        assert actual.max() > -INF
        assert (actual[np.isneginf(row)] == -INF).all()
        token = sample_jit(jnp.asarray([row], jnp.float32), state_of(params(**asked), vocab=4), jnp.zeros(1, jnp.int32))
        assert row[token[0]] > -INF


def test_a_row_where_nothing_is_possible_stays_so():
    for asked in ({}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0}):
        assert processed([-INF] * 3, prompt=(0,), output=(1,), repetition_penalty=2.0, **asked).tolist() == [-INF] * 3
    assert np.asarray(logprobs_jit(jnp.full((1, 3), -INF), jnp.zeros(1, jnp.int32), 3).top_BU).tolist() == [[-INF] * 3]


def test_among_enormous_equal_logits_the_draw_is_still_random():
    state = state_of(params(), vocab=4)
    drawn = [int(sample_jit(jnp.full((1, 4), 1e30), state, np.full(1, p, np.int32))[0]) for p in range(64)]
    assert set(drawn) == {0, 1, 2, 3}


def test_bfloat16_logits_are_processed_in_float32():
    logits_BV = jnp.asarray([[1.5, 2.5, -3.0]], jnp.bfloat16)
    state = state_of(params(temperature=0.3), vocab=3)
    np.testing.assert_array_equal(process_jit(logits_BV, state), process_jit(logits_BV.astype(jnp.float32), state))


# The Gumbel rule.


@pytest.mark.parametrize(
    ("asked", "survivors"),
    [({}, [0, 1, 2, 3, 4]), ({"temperature": 0.6, "top_k": 3}, [0, 1, 3]), ({"top_p": 0.7}, [1, 3])],
)
def test_draws_follow_the_softmax_of_the_processed_logits(asked, survivors):
    logits_V = jnp.asarray([1.0, 2.0, -1.0, 1.5, 0.0])
    state = state_of(params(seed=7, **asked), vocab=5)
    draw = jax.jit(jax.vmap(lambda position_B: sample(logits_V[None], state, position_B)[0]))
    counts = np.bincount(draw(jnp.arange(20_000)[:, None]), minlength=5)
    weights = np.exp(np.asarray(logits_V, np.float64)[survivors] / asked.get("temperature", 1.0))
    assert counts[survivors].sum() == 20_000
    assert stats.chisquare(counts[survivors], 20_000 * weights / weights.sum()).pvalue > 1e-3


def test_draws_at_one_position_are_independent_between_seeds():
    noise_BV = noise_jit(jnp.arange(5_000, dtype=jnp.uint32), jnp.full(5_000, 3), 4)
    counts = np.bincount(noise_BV.argmax(1), minlength=4)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(np.asarray(noise_BV).ravel(), "gumbel_r").pvalue > 1e-3


def test_noise_is_a_function_of_seed_and_position_alone():
    seed_B = np.array([5, 5, 9, 2**32 - 1, 5], np.uint32)
    position_B = np.array([0, 1, 0, 131_071, 0], np.int32)
    noise_BV = np.asarray(gumbel_noise(jnp.asarray(seed_B), jnp.asarray(position_B), V))
    assert (noise_BV[0] == noise_BV[4]).all()
    assert len({row.tobytes() for row in noise_BV}) == 4
    for row, seed, position in zip(noise_BV, seed_B, position_B, strict=True):
        np.testing.assert_array_equal(noise_jit(seed[None], position[None], V)[0], row)
    np.testing.assert_array_equal(noise_jit(seed_B[::-1], position_B[::-1], V), noise_BV[::-1])


def test_a_published_seed_keeps_its_noise():
    noise = gumbel_noise(jnp.asarray([42], jnp.uint32), jnp.asarray([7]), 4)
    np.testing.assert_allclose(noise[0], [0.0504430, 0.3776202, 0.1953783, 0.0345009], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    asked=st.lists(ASKED, min_size=B, max_size=B),
    prompts=st.lists(TOKENS, min_size=B, max_size=B),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_gets_the_same_token_alone_and_in_any_slot_of_any_batch(asked, prompts, seed):
    rng = np.random.default_rng(seed)
    asked = [params(**ask, seed=int(rng.integers(2**32))) for ask in asked]
    logits_BV = rng.normal(0, 2, (B, V)).astype(np.float32)
    position_B = rng.integers(0, 2**20, B, np.int32)
    state = jax.tree.map(np.asarray, state_of(*asked, prompts=prompts))
    processed_BV, token_B = jax.device_get((process_jit(logits_BV, state), sample_jit(logits_BV, state, position_B)))

    order = rng.permutation(B)
    shuffled = jax.tree.map(lambda leaf: leaf[order], state)
    np.testing.assert_array_equal(sample_jit(logits_BV[order], shuffled, position_B[order]), token_B[order])
    for slot in range(B):
        alone = jax.tree.map(lambda leaf, slot=slot: leaf[slot : slot + 1], state)
        np.testing.assert_array_equal(process_jit(logits_BV[slot : slot + 1], alone)[0], processed_BV[slot])
        token = sample_jit(logits_BV[slot : slot + 1], alone, position_B[slot : slot + 1])
        assert token[0] == token_B[slot]


def test_what_ends_a_sequence_is_not_drawn_before_its_least_length_unless_nothing_else_is_left():
    asked = params(temperature=0, min_new_tokens=3), params(temperature=0, min_new_tokens=3), params(temperature=0)
    state = SamplingState.from_params(asked, [(1, 2)] * 3, V, ends=[(7, 9), (7, 9), (7, 9)])
    logits_BV = np.zeros((3, V), np.float32)
    logits_BV[:, 7], logits_BV[:, 9], logits_BV[:, 4] = 3, 2, 1
    logits_BV[1, [v for v in range(V) if v not in (7, 9)]] = -INF  # as under a grammar that is at its end
    for position in range(2, 8):
        drawn_B = np.asarray(sample_jit(logits_BV, state, np.full(3, position, np.int32)))
        assert drawn_B.tolist() == [4 if position < 5 else 7, 7, 7]


def test_greedy_slots_ignore_noise_and_ties_go_to_the_lowest_id():
    state = state_of(params(temperature=0, seed=None), params(temperature=0), params(seed=1), vocab=4)
    logits_BV = jnp.asarray([[1.0, 3.0, 3.0, 0.0], [0.0] * 4, [0.0] * 4])
    drawn = np.array([sample_jit(logits_BV, state, np.full(3, position, np.int32)) for position in range(32)])
    assert (drawn[:, 0] == 1).all()
    assert (drawn[:, 1] == 0).all()
    assert len(set(drawn[:, 2].tolist())) == 4


def test_one_compiled_step_serves_any_parameters():
    step = jax.jit(lambda logits_BV, state, position_B: observe(state, sample(logits_BV, state, position_B), active_B))
    active_B = jnp.array([True])
    asks = [
        {},
        {"temperature": 0, "seed": None},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 1.3, "frequency_penalty": 1, "presence_penalty": -1, "logit_bias": {3: 2.0}},
    ]
    for position, asked in enumerate(asks):
        state = state_of(params(**asked), prompts=[range(position)])
        for _ in range(2):
            state = step(jnp.zeros((1, V)), state, jnp.full(1, position))
    assert step._cache_size() == 1


# Logprobs.


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([0, 5, V]), step=st.sampled_from([1 / 2, 2**-20]))
def test_logprobs_are_the_raw_log_softmax_with_rank_and_top(seed, n, step):
    rng = np.random.default_rng(seed)
    logits_BV = np.round(rng.normal(0, 3, (B, V)) / step) * step
    logits_BV[rng.random((B, V)) < 0.1] = -INF
    logits_BV[:, 1] = 0.0
    token_B = rng.integers(0, V, B)
    actual = jax.device_get(logprobs_jit(logits_BV.astype(np.float32), token_B.astype(np.int32), n))
    assert actual.top_ids_BU.shape == actual.top_BU.shape == (B, n)
    for slot, (logits, token) in enumerate(zip(logits_BV, token_B, strict=True)):
        expected = logits - np.log(np.exp(logits).sum())
        order = sorted(range(V), key=lambda i, logits=logits: (-logits[i], i))
        np.testing.assert_allclose(actual.emitted_B[slot], expected[token], atol=1e-5)
        assert actual.rank_B[slot] == 1 + order.index(token)
        assert actual.top_ids_BU[slot].tolist() == order[:n]
        np.testing.assert_allclose(actual.top_BU[slot], expected[order[:n]], atol=1e-5)


def test_logprobs_of_extreme_logits_are_not_nan():
    logits_BV = jnp.asarray([[1e30, -1e30, -INF, 3e38]])
    actual = logprobs_jit(logits_BV, jnp.array([3]), 4)
    assert actual.emitted_B.tolist() == [0.0]
    assert actual.top_ids_BU.tolist() == [[3, 0, 1, 2]]
    assert not np.isnan(actual.top_BU).any()


def test_logprobs_refuses_more_alternatives_than_tokens():
    with pytest.raises(ValueError, match=r"logprobs n 4 is outside \[0, 3\]; ask for at most"):
        logprobs(jnp.zeros((1, 3)), jnp.array([0]), 4)


# The state.


def test_observe_counts_active_slots_only_and_leaves_the_old_state_alone():
    before = state_of(params(), params(), vocab=3)
    after = observe(before, jnp.array([2, 1]), jnp.array([True, False]))
    after = observe(after, jnp.array([2, -1]), jnp.array([True, False]))
    assert after.counts_BV.tolist() == [[0, 0, 2], [0, 0, 0]]
    assert not before.counts_BV.any()
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.counts_BV = before.counts_BV


def test_state_holds_what_was_asked():
    state = state_of(
        params(top_k=3, top_p=0.5, seed=2**32 - 1, logit_bias={1: -2}), params(top_k=-1), prompts=[(4, 4), ()], vocab=5
    )
    assert state.top_k_B.tolist() == [3, 5]
    assert state.top_p_B.tolist() == [0.5, 1.0]
    assert state.seed_B.tolist() == [2**32 - 1, 0]
    assert state.bias_BV.tolist() == [[0, -2, 0, 0, 0], [0] * 5]
    assert state.prompt_BV.tolist() == [[False] * 4 + [True], [False] * 5]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32", "uint32", "bool"}


def test_state_is_a_pytree_whose_leaves_may_be_anything():
    state = state_of(params(), params(), vocab=3)
    assert [path[0].name for path, _ in jax.tree.leaves_with_path(state)] == [
        f.name for f in dataclasses.fields(SamplingState)
    ]
    assert jax.tree.map(lambda _: None, state).seed_B is None
    assert jax.eval_shape(lambda: state).bias_BV.shape == (2, 3)
    _, states = jax.lax.scan(lambda s, _: (observe(s, jnp.array([0, 1]), s.seed_B == 0),) * 2, state, None, length=3)
    assert states.counts_BV[2].tolist() == [[3, 0, 0], [0, 3, 0]]


def test_state_refuses_a_sampled_slot_without_a_seed():
    with pytest.raises(ValueError, match=r"seed None of slot 1, .* temperature 0.5; draw one"):
        state_of(params(), params(seed=None, temperature=0.5))


def test_state_refuses_parameters_and_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match="top_p 2"):
        state_of(params(top_p=2))
    with pytest.raises(ValueError, match=r"slot 0 has token ids 1\.\.50, outside \[0, 49\]; encode"):
        state_of(params(), prompts=[(1, 50)])
    with pytest.raises(ValueError, match="1 sampling params but 2 prompts; give one"):
        state_of(params(), prompts=[(), ()])


# What may be asked for.


@pytest.mark.parametrize(
    ("field", "values", "limit"),
    [
        ("temperature", [-0.1, INF, NAN, 1e39], r"[0, 3.4"),
        ("top_k", [-2, 2**31], "[-1, 2147483647]"),
        ("top_p", [0, -0.5, 1.01, NAN, INF], "[1.175494351e-38, 1]"),
        ("min_p", [-0.1, 1.1, NAN], "[0, 1]"),
        ("repetition_penalty", [0, -1, INF, NAN, 1e-40], "[1.175494351e-38, 3.4"),
        ("frequency_penalty", [-2.1, 2.1, NAN, -INF], "[-2, 2]"),
        ("presence_penalty", [-2.1, 2.1, NAN, INF], "[-2, 2]"),
        ("max_new_tokens", [0, -1], "[1, 2147483647]"),
        ("seed", [-1, 2**32], "[0, 4294967295]"),
        ("logprobs", [-1, 21], "[0, 20]"),
    ],
)
def test_a_number_out_of_range_is_refused_with_limit_and_remedy(field, values, limit):
    for value in values:
        with pytest.raises(ValueError) as refused:
            SamplingParams(**{field: value}).validate(V)
        message, remedy = str(refused.value).split("; ")
        assert message.startswith(f"{field} {value} is outside {limit}")
        assert remedy.startswith("use ")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"logit_bias": {50: 1.0}}, "logit_bias has token id 50, outside [0, 49] of this vocabulary; leave it out"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has token id -1, outside [0, 49]"),
        ({"logit_bias": {3: NAN}}, "logit_bias nan of token 3 is outside [-3.4"),
        ({"logit_bias": {3: -INF}}, "logit_bias -inf of token 3 is outside [-3.4"),
        ({"logit_bias": {3: 1e39}}, "use -100 to all but ban a token"),
        ({"stop_token_ids": (2, 50)}, "stop_token_ids has token id 50, outside [0, 49]"),
        ({"stop": ("a", "")}, "stop ('a', '') has an empty string, which matches everywhere; leave it out"),
    ],
)
def test_ids_biases_and_stop_strings_are_checked(asked, message):
    with pytest.raises(ValueError) as refused:
        SamplingParams(**asked).validate(V)
    assert message in str(refused.value)


def test_fewer_tokens_than_the_least_are_refused():
    with pytest.raises(ValueError, match="min_new_tokens 9 exceeds max_new_tokens 8; lower it"):
        params(min_new_tokens=9, max_new_tokens=8).validate(V)
    params(min_new_tokens=8, max_new_tokens=8).validate(V)


def test_a_bare_stop_string_is_refused():
    asked = SamplingParams()
    object.__setattr__(asked, "stop", "END")  # as from a caller without type checks
    with pytest.raises(ValueError, match=r"stop 'END' is a single string, not a tuple of them; use \('END',\)"):
        asked.validate(V)


def test_more_logprobs_than_tokens_are_refused():
    with pytest.raises(ValueError, match="logprobs 8 exceeds the vocabulary of 7 tokens; ask for at most 7"):
        SamplingParams(logprobs=8).validate(7)


def test_the_limits_themselves_are_accepted():
    for asked in (
        {},
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "frequency_penalty": -2, "presence_penalty": 2},
        {"min_p": 1.0, "logprobs": 20, "seed": 2**32 - 1, "max_new_tokens": 1, "repetition_penalty": 1e-6},
        {"logprobs": 0, "logit_bias": {0: -100, V - 1: 100}, "stop_token_ids": (0, V - 1), "stop": ("END",)},
    ):
        SamplingParams(**asked).validate(V)
