"""The formula is that of two argmaxes of the same noise, and what follows for rounds is what speculation does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glmjax.evaluation.coupling as module
from glmjax.evaluation.coupling import COUPLINGS, coupling, rejection, shared_noise
from glmjax.evaluation.rollout import Continued, continued
from glmjax.model.cache import ContiguousCache
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.speculation import DecodeState, _draft, prefill


def distributions(seed, batch, vocab, zeros=False):
    """Pairs of them, some nearly equal and some far apart."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, batch, vocab)) * rng.uniform(0.1, 4, (1, batch, 1))
    weights = np.exp(logits)
    if zeros:
        weights *= rng.random(weights.shape) < 0.6
        weights[:, :, 0] += 0.1
    return tuple(jnp.asarray(weights / weights.sum(-1, keepdims=True), jnp.float32))


def by_definition(p, q):
    """1 / Σⱼ max(pⱼ / pᵢ, qⱼ / qᵢ), one by one."""
    return [1 / np.maximum(p / p[i], q / q[i]).sum() if p[i] and q[i] else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("vocab", [1, 2, 5, 40])
def test_sorted_sums_are_the_formula(vocab, zeros):
    p_BV, q_BV = distributions(vocab, 20, vocab, zeros)
    wanted = [by_definition(p, q) for p, q in np.stack([p_BV, q_BV], axis=1).astype(float)]
    np.testing.assert_allclose(shared_noise(p_BV, q_BV), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("zeros", [False, True])
def test_the_formula_is_the_share_of_equal_draws(zeros):
    p_BV, q_BV = distributions(3, 6, 4, zeros)
    draws = 200_000
    noise_ZV = jax.random.gumbel(jax.random.key(0), (draws, 4))
    for p, q, both in zip(p_BV, q_BV, np.asarray(shared_noise(p_BV, q_BV)), strict=True):
        target_Z, draft_Z = (np.asarray(jnp.argmax(jnp.log(x) + noise_ZV, axis=1)) for x in (p, q))
        found = np.bincount(target_Z[target_Z == draft_Z], minlength=4) / draws
        np.testing.assert_allclose(found, both, atol=4 * 0.5 / draws**0.5)


@pytest.mark.parametrize("both", COUPLINGS.values(), ids=COUPLINGS)
def test_equal_distributions_are_always_accepted_and_disjoint_ones_never(both):
    p_BV = distributions(4, 5, 9, zeros=True)[0]
    np.testing.assert_allclose(both(p_BV, p_BV), p_BV, rtol=1e-5)
    one, other = jnp.float32([[0.4, 0.6, 0, 0]]), jnp.float32([[0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(both(one, other), np.zeros((1, 4)))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("vocab", [2, 7, 300])
def test_shared_noise_lies_between_its_lower_bound_and_rejection(vocab, zeros):
    p_BV, q_BV = distributions(vocab, 50, vocab, zeros)
    ours_B, best_B = (np.asarray(both(p_BV, q_BV)).sum(1) for both in (shared_noise, rejection))
    distance_B = np.abs(p_BV - q_BV).sum(1) / 2
    np.testing.assert_allclose(best_B, 1 - distance_B, atol=1e-5)
    assert np.all(ours_B <= best_B + 1e-5)
    assert np.all(ours_B >= (1 - distance_B) / (1 + distance_B) - 1e-5)


PROMPT, NEW, DRAFTS = 24, 12, 2
SAMPLED = SamplingParams(temperature=1, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts(glm):
    return [np.random.default_rng(seed).integers(4, 98, PROMPT) for seed in range(3)]


@pytest.fixture(scope="module")
def text(glm, prompts):
    return continued(glm, prompts, SAMPLED, NEW, DRAFTS)


def test_rejection_accepts_more_of_the_same_text(glm, prompts, text):
    found = coupling(glm, prompts, text, DRAFTS, NEW)
    ours, other = (found.expected[name] for name in ("shared noise", "rejection"))
    assert 1 < ours.accept_length < other.accept_length < DRAFTS + 1
    assert found.gain == other.accept_length / ours.accept_length
    for mine, best in zip(ours.after_accepted, other.after_accepted, strict=True):
        assert 0 < mine < best < 1
    assert found.rounds > 0


def test_what_is_expected_is_what_speculation_does(glm, prompts):
    """Several hundred texts after one prompt, so that chance is small."""
    several = [prompts[0]] * 400
    found = coupling(glm, several, continued(glm, several, SAMPLED, NEW, DRAFTS), DRAFTS, NEW)
    ours, reached = found.expected["shared noise"], found.rounds
    for expected, observed in zip(ours.after_accepted, found.observed.after_accepted, strict=True):
        assert observed == pytest.approx(expected, abs=4 * (expected * (1 - expected) / reached) ** 0.5)
        reached *= observed
    assert found.observed.accept_length == pytest.approx(ours.accept_length, abs=4 * 0.7 / found.rounds**0.5)


def test_draft_distributions_are_those_of_speculation(glm, monkeypatch):
    """Along its own greedy drafts every one of them is the most likely, and no other is."""
    prompts_BT = jnp.asarray(np.random.default_rng(1).integers(4, 98, (8, PROMPT + 1)), jnp.int32)
    greedy = SamplingState.from_params([SamplingParams(temperature=0)] * 8, [()] * 8, glm.config.vocab_size, 98)

    @jax.jit
    def chain(model, prompts_BT):
        cache = ContiguousCache.create(glm.config, 8, PROMPT + DRAFTS + 1, model.dtype, mtp=True)
        step = cache.step(jnp.tile(jnp.arange(PROMPT), (8, 1)))
        hidden_BTD, cache = prefill(model, cache, cache.tail_BD, prompts_BT[:, :-1], step)
        state = DecodeState(cache, hidden_BTD[:, -1], prompts_BT[:, -1], jnp.full(8, PROMPT), greedy)
        return _draft(model, state, DRAFTS)[0]

    ids_BT = jnp.concatenate([prompts_BT[:, :-1], chain(glm.weights, prompts_BT)], axis=1)
    ids_BT = jnp.concatenate([ids_BT, ids_BT.at[:, -1].set(3)])  # once more, with another second draft
    monkeypatch.setattr(module, "COUPLINGS", {"most likely": lambda p, q: jax.nn.one_hot(jnp.argmax(q, axis=1), 104)})
    along = jax.jit(module._along.__wrapped__, static_argnames=("prompt", "num_draft", "vocab"))
    _, given_SNB = along(glm.weights, ids_BT, prompt=PROMPT, num_draft=DRAFTS, vocab=98)["most likely"]
    assert np.all(given_SNB[0, 0] > 0)
    assert np.all(given_SNB[0, 1, :8] > 0)
    assert np.all(given_SNB[0, 1, 8:] == 0)


def test_only_rounds_whose_drafts_stand_before_a_loop_count(glm, prompts):
    looping = [Continued([*range(4, 10), *[7] * 60], [3, 1, 2] * 20)] * 3  # rounds begin at tokens 0, 3, 4
    assert coupling(glm, prompts, looping, DRAFTS, NEW).rounds == 6
    found = coupling(glm, prompts, [Continued([7] * 60, [1] * 59)] * 3, DRAFTS, NEW)
    assert (found.rounds, found.gain, found.observed.accept_length) == (0, None, None)
    assert found.expected["rejection"].after_accepted == (None, None)
