"""A loop is 48 tokens with a period of at most 24, and begins where they do."""

import numpy as np
import pytest

from glmjax.evaluation.loops import PERIOD, WINDOW, before_loop, loop_start


def varied(length):
    return list(range(100, 100 + length))


@pytest.mark.parametrize("period", [1, 2, 7, PERIOD])
@pytest.mark.parametrize("before", [0, 5, 60])
def test_a_loop_begins_with_its_first_repeated_token(period, before):
    looping = [i % period for i in range(WINDOW)]
    assert loop_start(varied(before) + looping) == before
    assert loop_start(varied(before) + looping + varied(30)) == before


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [1] * (WINDOW - 1),
        varied(200),
        [i % (PERIOD + 1) for i in range(200)],
        varied(50) + [i % 5 for i in range(WINDOW - 1)] + varied(50),
    ],
    ids=["nothing", "too short", "all different", "too long a period", "ends in time"],
)
def test_these_are_no_loops(tokens):
    assert loop_start(np.array(tokens)) is None


def test_the_earliest_loop_counts():
    tokens = [i % 3 for i in range(WINDOW)] + varied(9) + [7] * WINDOW
    assert loop_start(tokens) == 0


def test_what_comes_before_a_loop_is_at_most_what_there_is():
    tokens = varied(20) + [7] * WINDOW
    assert [before_loop(tokens, most) for most in (10, 30)] == [10, 20]
    assert before_loop(varied(5), 30) == 5
