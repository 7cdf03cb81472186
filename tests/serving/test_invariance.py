"""A short run of benchmarks/invariance.py: however requests are served, they give what each gives alone."""

import dataclasses
import functools

import numpy as np
import pytest

from benchmarks.invariance import Case, alone, cases, compare, lengths, served, settings
from glmjax.serving.engine import Engine
from glmjax.serving.plan import Admission
from tests.serving.tiny import CONFIG, ENGINE, tiny

SERVED = dataclasses.replace(ENGINE, max_num_seqs=4, pages=12, num_draft=2, debug=True)
NEW = 40


@functools.cache
def requests():
    rng = np.random.default_rng(1)
    wanted = lengths(20, 64 - NEW, page=8, chunk=16, topk=CONFIG.index_topk)
    return cases([rng.integers(0, 16, 64) for _ in range(20)], wanted, NEW)


@functools.cache
def references():
    return [alone(tiny(), case) for case in requests()]


@pytest.fixture(scope="module")
def engine():
    with Engine(tiny(), SERVED) as engine:
        yield engine


def compared(engine, only=slice(None), **fields):
    asked, expected = requests()[only], references()[only]
    return compare(tiny(), asked, expected, served(engine, asked, np.random.default_rng(2), **fields))


def holds(engine, only=slice(None), **fields):
    found = compared(engine, only, **fields)
    assert found.holds, "\n".join(map(str, found.differences))
    assert found.tokens > 0.9 * NEW * len(references()[only])


def test_batches_drafts_preemptions_and_the_cache_change_nothing(engine):
    holds(engine, use_cache=False)
    holds(engine)
    longest = max(range(len(requests())), key=lambda n: len(requests()[n].prompt))
    for _ in range(2):  # alone, so that its pages are still there the second time
        before = engine.stats()
        holds(engine, slice(longest, longest + 1))
    stats = engine.stats()
    assert stats.cached_tokens > before.cached_tokens
    assert stats.preemptions > 0
    assert 0 < stats.accepted < stats.drafted


def test_a_fault_would_be_found(engine, monkeypatch):
    """Whoever is preempted forgets what penalties had counted."""
    sampling = Admission.sampling
    forgetful = lambda self, *sizes: sampling(dataclasses.replace(self, emitted=()), *sizes)  # noqa: E731
    monkeypatch.setattr(Admission, "sampling", forgetful)
    found = compared(engine)
    assert not found.holds
    assert any(not difference.excused for difference in found.differences)


def test_the_shortest_chunks_and_no_drafts_change_nothing():
    with Engine(tiny(), dataclasses.replace(SERVED, num_draft=0, chunk_tokens=8, max_num_seqs=1)) as engine:
        holds(engine)


# The comparison itself


def test_lengths_cross_every_boundary():
    wanted = lengths(60, 700, page=64, chunk=512, topk=256)
    assert len(wanted) == 60
    assert {1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 700} <= set(wanted)
    assert max(lengths(60, 300, page=64, chunk=512, topk=256)) == 300


def test_every_length_is_asked_for_greedily_and_sampled():
    for greedy, sampled in zip(requests()[::2], requests()[1::2], strict=True):
        assert len(greedy.prompt) == len(sampled.prompt)
        assert {greedy.params.temperature > 0, sampled.params.temperature > 0} == {False, True}


def test_what_is_the_same_has_no_difference():
    compared = compare(tiny(), requests(), references(), references())
    assert compared == (NEW * len(requests()), ())
    assert compared.holds


def test_another_token_is_found_and_not_taken_for_rounding():
    found = [list(ids) for ids in references()]
    found[4][7] ^= 1
    found[4][9] ^= 1  # what follows a difference says nothing
    compared = compare(tiny(), requests(), references(), found)
    [difference] = compared.differences
    assert (difference.request, difference.position) == (4, 7)
    assert (difference.expected, difference.found) == (references()[4][7], found[4][7])
    assert compared.tokens == NEW * (len(found) - 1) + 8
    assert difference.margins.least > 1e-4
    assert not compared.holds
    assert "NOT ROUNDING" in str(difference)


def test_a_tie_is_taken_for_rounding_once():
    """The bias makes two tokens the only ones that can be, and equals."""
    params = dataclasses.replace(requests()[0].params, temperature=0, top_p=1.0, repetition_penalty=1.0)
    params = dataclasses.replace(params, frequency_penalty=0.0, presence_penalty=0.0)
    logits_V = np.asarray(tiny().forward([[3, 1]]).logits_BTV[0, -1], np.float64)
    case = Case([3, 1], dataclasses.replace(params, logit_bias={5: 100 - logits_V[5], 6: 100 - logits_V[6]}))
    once = compare(tiny(), [case], [[5]], [[6]])
    assert once.differences[0].margins.token < 1e-4
    assert once.holds
    assert not compare(tiny(), [case, case], [[5], [5]], [[6], [6]]).holds


def test_a_sequence_that_ends_elsewhere_differs_there():
    cut = [*references()[:-1], references()[-1][:-1]]
    [difference] = compare(tiny(), requests(), references(), cut).differences
    assert (difference.position, difference.found) == (NEW - 1, -1)


@pytest.mark.parametrize("length", [256, 1024])
def test_settings_are_on_few_engines(length):
    each = settings(length)
    assert len({setting.engine for setting in each}) == 6
    assert {setting.engine.num_draft for setting in each} == {0, 1, 2, 4}
    assert len({setting.engine.chunk_tokens for setting in each}) == 3
