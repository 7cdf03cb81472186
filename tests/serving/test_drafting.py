"""How many tokens are drafted: as many as pay, unknown depths and now and then the others."""

from collections import Counter

import pytest

from glmjax.serving.drafting import Acceptance, Depths, depths


def after(accepted, rounds):
    acceptance = Acceptance()
    acceptance.push([round(rate * rounds) for rate in accepted], rounds)
    return acceptance


ALWAYS, NEVER = after([1, 1, 1, 1], 1000), after([0, 0, 0, 0], 1000)


def chosen(most, requests, seconds, times=800):
    choosing = Depths(depths(most, adapts=True))
    return Counter(choosing.choose(requests, seconds) for _ in range(times))


def paces(round_seconds, draft_seconds):
    return lambda depth: round_seconds + depth * draft_seconds


# What is expected of drafts


def test_a_round_without_drafts_gives_a_token():
    assert Acceptance().tokens(0) == NEVER.tokens(0) == ALWAYS.tokens(0) == 1


def test_drafts_that_nobody_has_tried_count_as_accepted():
    assert Acceptance().tokens(3) == 4
    assert after([0], 1000).tokens(3) == pytest.approx(3, abs=0.01)


def test_a_draft_counts_as_often_as_it_was_accepted():
    assert after([0.75, 0.5, 0.25], 1000).tokens(2) == pytest.approx(1 + 0.75 + 0.5, abs=0.01)


def test_what_was_seen_once_decides_nothing():
    once = Acceptance()
    once.push([0], 1)
    assert once.tokens(1) == pytest.approx(1.8)


def test_before_its_own_first_round_a_request_is_expected_to_go_as_others_do():
    others = after([0.5, 0.25], 100_000)
    mine = Acceptance(others)
    assert mine.tokens(3) == pytest.approx(1 + 0.5 + 0.25 + 1, abs=0.01)
    mine.push([0], 1)
    assert mine.tokens(2) == pytest.approx(1 + 0.4 + 0.25, abs=0.01)


def test_what_is_long_ago_is_forgotten():
    changed = after([1.0], 100_000)
    changed.push([0], 256)
    assert changed.tokens(1) == pytest.approx(1.2)


# What is chosen


@pytest.mark.parametrize(("most", "choices"), [(0, (0,)), (1, (1, 0)), (3, (3, 1, 0)), (5, (5, 2, 1, 0))])
def test_depths_are_halves(most, choices):
    assert depths(most, adapts=True) == choices


def test_without_a_choice_everything_is_drafted():
    choosing = Depths(depths(3, adapts=False))
    assert {choosing.choose([NEVER], paces(0, 1)) for _ in range(100)} == {3}


@pytest.mark.parametrize(
    ("requests", "seconds", "best"),
    [
        ([ALWAYS], paces(1, 0.1), 4),
        ([NEVER], paces(1, 0.1), 0),
        ([after([0.9, 0.1, 0, 0], 1000)], paces(1, 0.1), 1),
        ([after([0.9, 0.8, 0.1, 0], 1000)], paces(1, 0.1), 2),
        ([ALWAYS], paces(1, 2), 0),
        ([ALWAYS, NEVER, NEVER], paces(1, 0.2), 4),
        ([ALWAYS, NEVER, NEVER], paces(1, 0.4), 0),
    ],
)
def test_mostly_it_is_what_gives_most_tokens_a_second(requests, seconds, best):
    found = chosen(4, requests, seconds)
    assert found[best] >= 700
    assert set(found) == {4, 2, 1, 0}, "what is never tried is never known"


def test_now_and_then_everything_is_drafted_whatever_it_costs():
    assert chosen(4, [NEVER], paces(1, 9))[4] == 25


def test_what_is_not_known_is_tried():
    known = {3: 1.0}
    choosing, tried = Depths(depths(3, adapts=True)), []
    for _ in range(3):
        tried.append(choosing.choose([NEVER], known.get))
        known[tried[-1]] = 1.0
    assert tried[:2] == [1, 0]
