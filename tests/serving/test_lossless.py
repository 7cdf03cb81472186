"""Speculation is lossless: what the serving programs sample is distributed as the plain model says, exactly.

A vocabulary of eight tokens is small enough to write down the probability of everything that four tokens can be. The
plain model reads all prefixes at once; many seeds go through the programs; a G-test compares. Seeds are fixed, so that the
outcome is, too. The first token comes from the prompt's chunk, the three after it from rounds of drafts.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from glmjax.model.sampling import process
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.serving.pages import OK, PagedCache, PageTable
from glmjax.serving.programs import Batch, Chunks, decode_rounds, read_chunks
from glmjax.serving.slots import Slots
from tests.serving.tiny import tiny

VOCAB, NEW, SLOTS, BATCHES = 8, 4, 512, 8
SAMPLES = SLOTS * BATCHES
PAGE, PAGES = 4, 3  # rows of a page, and pages of a sequence
PROMPT = (3, 1, 4, 1, 5)
PARAMS = SamplingParams(
    max_new_tokens=NEW,
    temperature=0.8,
    top_p=0.9,
    repetition_penalty=1.3,
    frequency_penalty=0.6,
    presence_penalty=0.4,
    seed=0,
)
SIGNIFICANCE = 1e-3
"""A right distribution would be rejected for one choice of seeds in a thousand; those here are among the others."""


@functools.cache
def exact(params=PARAMS, forgets=0):
    """Probability of every four tokens [V, V, V, V], float64.

    Args:
        params: how they are sampled.
        forgets: a fault: tokens before the next one that penalties do not count.
    """
    prefixes = np.array([*itertools.product(range(VOCAB), repeat=NEW - 1)])
    ids = np.concatenate([np.broadcast_to(PROMPT, (len(prefixes), len(PROMPT))), prefixes], axis=1)
    logits_BTV = tiny(VOCAB).forward(ids).logits_BTV
    state = SamplingState.from_params([params] * len(ids), [PROMPT] * len(ids), VOCAB)
    joint = np.ones((), np.float64)
    for t in range(NEW):
        counted = prefixes[:, : max(0, t - forgets)]
        counts_BV = (counted[:, :, None] == np.arange(VOCAB)).sum(axis=1)
        emitted = dataclasses.replace(state, counts_BV=jnp.asarray(counts_BV, jnp.int32))
        score_BV = np.asarray(process(logits_BTV[:, len(PROMPT) - 1 + t], emitted), np.float64)
        p_BV = np.exp(score_BV - score_BV.max(axis=1, keepdims=True))
        p_BV /= p_BV.sum(axis=1, keepdims=True)
        first = slice(None, None, VOCAB ** (NEW - 1 - t))  # rows that differ in the first t tokens
        joint = joint[..., None] * p_BV[first].reshape((VOCAB,) * (t + 1))
    assert joint.sum() == pytest.approx(1, abs=1e-12)
    return joint


@functools.cache
def sampled(num_draft):
    """How often each four tokens came, and how many tokens each sequence's first round gave."""
    model = tiny(VOCAB).weights
    read = jax.jit(functools.partial(read_chunks, model))
    decode = jax.jit(functools.partial(decode_rounds, model, num_draft=num_draft, most_rounds=NEW - 1))
    slots = np.arange(SLOTS, dtype=np.int32)
    none_B, zero_B, all_B = np.full(SLOTS, -1, np.int32), np.zeros(SLOTS, np.int32), np.ones(SLOTS, bool)
    pages_BM = np.random.default_rng(0).permutation(SLOTS * PAGES).astype(np.int32).reshape(SLOTS, PAGES)
    table = PageTable(pages_BM, np.zeros_like(pages_BM))
    batch = Batch(slots, zero_B, table, none_B[:, None], none_B[:1], np.array(False))
    ids_BT = np.tile(np.int32(PROMPT), (SLOTS, 1))
    chunks = Chunks(ids_BT, zero_B, np.full(SLOTS, len(PROMPT), np.int32), all_B, none_B, np.full_like(ids_BT, -1))
    end_B = np.full(SLOTS, len(PROMPT) + NEW - 1, np.int32)

    counts, first_round = np.zeros((VOCAB,) * NEW, int), []
    for begin in range(0, SAMPLES, SLOTS):
        seeded = [dataclasses.replace(PARAMS, seed=begin + b) for b in range(SLOTS)]
        state = Slots.create(SLOTS, model.config.hidden_size, VOCAB, jnp.float32)
        state = dataclasses.replace(state, sampling=SamplingState.from_params(seeded, list(ids_BT), VOCAB))
        cache = PagedCache.create(model.config, SLOTS * PAGES, PAGE, jnp.float32, tail_dtype=jnp.float32, mtp=True)
        cache, state, first = read(cache, state, batch, chunks)
        _, _, rest = decode(cache, state, batch, end_B, np.int32(NEW - 1))
        assert (np.asarray(rest.fault_B) == OK).all()
        ids_BS = np.concatenate([first.tokens_BS, rest.tokens_BS[:, : NEW - 1]], axis=1)
        np.add.at(counts, tuple(ids_BS.T), 1)
        first_round += np.asarray(rest.count_ZB)[0].tolist()
    return counts, np.array(first_round)


def p_value(counts, joint):
    """Of a G-test; outcomes that are expected less than five times count as one."""
    expected = joint.ravel() * counts.sum()
    often = expected >= 5
    observed = np.append(counts.ravel()[often], counts.ravel()[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    some = observed > 0
    g = 2 * np.sum(observed[some] * np.log(observed[some] / expected[some]))
    return chi2.sf(g, len(expected) - 1)


@pytest.mark.parametrize("num_draft", [2, 3])
def test_what_is_sampled_is_distributed_as_the_plain_model_says(num_draft):
    counts, _ = sampled(num_draft)
    assert counts.sum() == SAMPLES
    assert not counts[exact() == 0].any()  # what top-p excludes never comes
    assert p_value(counts, exact()) > SIGNIFICANCE


@pytest.mark.parametrize("num_draft", [2, 3])
def test_meanwhile_drafts_are_accepted_and_rejected(num_draft):
    _, first_round = sampled(num_draft)
    for given in (1, 2, 3):
        assert np.mean(first_round == given) > 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        {"params": dataclasses.replace(PARAMS, top_p=1.0)},
        {"params": dataclasses.replace(PARAMS, temperature=0.9)},
        {"params": dataclasses.replace(PARAMS, repetition_penalty=1.0)},
        {"params": dataclasses.replace(PARAMS, frequency_penalty=0.0)},
        {"params": dataclasses.replace(PARAMS, presence_penalty=0.0)},
        {"forgets": 1},  # as if a draft were drawn without the draft before it
    ],
    ids=["top_p", "temperature", "repetition", "frequency", "presence", "counts"],
)
def test_a_wrong_distribution_is_rejected(wrong):
    counts, _ = sampled(2)
    assert p_value(counts, exact(**wrong)) < SIGNIFICANCE / 1000
