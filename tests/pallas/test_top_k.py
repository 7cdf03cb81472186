"""Exactly the best visible positions, ties to the lowest, by every method alike."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.pallas import selection
from glmjax.pallas import top_k as module

METHODS = ["by_sorting", "by_bisection", "by_placing"]
INF = np.inf
DENORMAL = np.float32(1e-42)


@functools.partial(jax.jit, static_argnums=(0, 4))
def top_k(method, scores_BTS, first_BT, last_BT, k):
    """As positions, whichever form the method gives."""
    k = min(k, scores_BTS.shape[-1])
    visible_BTS = selection.visible(first_BT, last_BT, scores_BTS.shape[-1])
    selected = getattr(module, method)(module.comparable(scores_BTS, visible_BTS), k)
    return selection.positions(selected, k)


def expected(scores_BTS, first_BT, last_BT, k):
    """Sorted by (−score, position), the visible ones alone; ascending, then −1."""
    scores_BTS = np.asarray(scores_BTS, np.float64)
    batch, queries, length = scores_BTS.shape
    out = np.full((batch, queries, min(k, length)), -1, np.int32)
    for b, t in np.ndindex(batch, queries):
        visible = np.arange(max(0, first_BT[b, t]), min(length - 1, last_BT[b, t]) + 1)
        order = np.lexsort((visible, -scores_BTS[b, t, visible]))
        best = np.sort(visible[order[:k]])
        out[b, t, : len(best)] = best
    return out


def check(method, scores_BTS, first_BT=None, last_BT=None, k=3):
    scores_BTS = np.asarray(scores_BTS, np.float32)
    first_BT = np.zeros(scores_BTS.shape[:2], np.int32) if first_BT is None else np.asarray(first_BT, np.int32)
    last_BT = first_BT * 0 + scores_BTS.shape[2] - 1 if last_BT is None else np.asarray(last_BT, np.int32)
    got = top_k(method, scores_BTS, first_BT, last_BT, k)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected(scores_BTS, first_BT, last_BT, k))


ROWS = {  # adversarial scores of eight positions
    "distinct": [3, 1, 4, 1.5, 9, 2, 6, 5],
    "ascending": [1, 2, 3, 4, 5, 6, 7, 8],
    "descending": [8, 7, 6, 5, 4, 3, 2, 1],
    "negative": [-3, -1, -4, -1.5, -9, -2, -6, -5],
    "either sign": [-3, 1, -4, 1.5, 0, -2, 6, -5],
    "constant": [2.5] * 8,
    "all zero": [0.0] * 8,
    "zeros of both signs": [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0],
    "zeros among negatives": [-1, -0.0, -1, 0.0, -1, -0.0, 0.0, -1],
    "ties at the boundary": [5, 1, 1, 5, 1, 1, 1, 1],
    "ties among negatives": [-5, -1, -1, -5, -1, -1, -7, -1],
    "all minus infinity": [-INF] * 8,
    "some minus infinity": [-INF, -INF, 1, -INF, -INF, -2, -INF, -INF],
    "plus infinity": [INF, 1, -INF, INF, 2, INF, INF, -INF],
    "neighbours": [1, np.nextafter(np.float32(1), np.float32(2)), 1, np.nextafter(np.float32(1), np.float32(0))] * 2,
    "extremes": [3.4e38, -3.4e38, 1.2e-38, -1.2e-38, 3.4e38, -3.4e38, 0.0, -0.0],
}
WINDOWS = {  # first, last
    "all": (0, 7),
    "beyond both ends": (-5, 70),
    "causal": (0, 4),
    "inner": (2, 5),
    "tail": (6, 7),
    "one": (3, 3),
    "one at the start": (0, 0),
    "one at the end": (7, 7),
    "none": (4, 3),
    "none before the start": (0, -1),
    "none after the end": (8, 7),
    "outside": (9, 12),
}


@pytest.mark.parametrize("k", [1, 3, 7, 100])
@pytest.mark.parametrize("method", METHODS)
def test_every_adversarial_row_in_every_window_is_exact(method, k):
    scores = np.array(list(ROWS.values()), np.float32)
    first, last = np.array(list(WINDOWS.values()), np.int32).T
    shape = (len(ROWS), len(WINDOWS))
    scores_BTS = np.broadcast_to(scores[:, None], (*shape, 8))
    check(method, scores_BTS, np.broadcast_to(first, shape), np.broadcast_to(last, shape), k)


@pytest.mark.parametrize("method", METHODS)
def test_one_position_can_be_selected_or_not(method):
    for score in (1.0, -1.0, 0.0, -INF):
        check(method, np.full((1, 2, 1), score), [[0, 1]], [[0, 0]], k=4)


@pytest.mark.parametrize("method", METHODS)
def test_denormals_are_zeros(method):
    """XLA on the CPU compares them as zeros but sorts them, and their bits, by value: one of the two must hold."""
    scores = DENORMAL * np.array([1, -1, 2, -2, 3, 5, 4, 0, -0.0], np.float32)
    scores[[2, 6]] = 1, -1
    first, last = np.zeros((1, 2), np.int32), np.full((1, 2), 8, np.int32)
    got = top_k(method, np.broadcast_to(scores, (1, 2, 9)), first, last, 4)
    np.testing.assert_array_equal(got, [[[0, 1, 2, 3]] * 2])


SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF]),
    st.floats(width=32, allow_nan=False, allow_subnormal=False).map(lambda x: max(x, -3e38) if np.isfinite(x) else x),
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    hnp.arrays(np.float32, (2, 3, 13), elements=SCORES, fill=st.nothing()),
    hnp.arrays(np.int32, (2, 3), elements=st.integers(-2, 14)),
    hnp.arrays(np.int32, (2, 3), elements=st.integers(-2, 14)),
    st.sampled_from([1, 5]),
)
def test_any_scores_in_any_window_are_exact(scores_BTS, first_BT, last_BT, k):
    for method in METHODS:
        check(method, scores_BTS, first_BT, last_BT, k)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("queries", "length", "k"), [(17, 1000, 64), (2, 4097, 2048)])
def test_many_ties_in_long_rows_are_exact(method, queries, length, k):
    rng = np.random.default_rng(0)
    scores = np.round(rng.standard_normal((1, queries, length)), 1)  # some seventy different scores, both zeros
    last = rng.integers(-1, length, (1, queries))
    check(method, scores, np.maximum(last - length // 2, 0), last, k)
