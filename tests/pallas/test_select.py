"""select: the indexer's scores and the best of them, block by block, through pages.

Queries, keys and weights are small multiples of powers of two, so that scores are exact and often tied.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glmjax.pallas.select as selecting
from glmjax.pallas import selection
from glmjax.pallas.rows import Rows
from glmjax.pallas.select import index_scores, select

B, T, S, I, J = 2, 7, 24, 3, 4  # noqa: E741
L, A = 2, 4  # layers; positions in a page


def dyadic(rng, shape):
    return (rng.integers(-4, 5, shape) / 4).astype(np.float32)


@functools.cache
def case():
    rng = np.random.default_rng(0)
    q, weights, keys = (dyadic(rng, shape) for shape in ((B, T, I, J), (B, T, I), (L, B, S, J)))
    last = np.arange(T) * 3 + np.array([[2], [1]])
    first = np.maximum(last - 15, 0)
    first[0, 0], last[0, 0] = 1, 0  # sees nothing
    first[1, 1] = last[1, 1]  # sees one
    return q, weights, keys, first.astype(np.int32), last.astype(np.int32)


def scores(q, weights, keys):
    """s[t] = Σ_i w_i · relu(q_i · k_t · J^-0.5) in float64."""
    dots = np.einsum("btij,bsj->btis", *(np.asarray(x, np.float64) for x in (q, keys)))
    return np.einsum("bti,btis->bts", np.asarray(weights, np.float64), np.maximum(dots * q.shape[-1] ** -0.5, 0))


def expected(layer, k):
    q, weights, keys, first, last = case()
    out = np.full((B, T, min(k, S)), -1)
    score = scores(q, weights, keys[layer])
    for b, t in np.ndindex(B, T):
        visible = np.arange(first[b, t], min(last[b, t], S - 1) + 1)
        best = np.sort(visible[np.lexsort((visible, -score[b, t, visible]))][:k])
        out[b, t, : len(best)] = best
    return out


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def run(block_bytes, rows, layer, pages, k, way="mask"):
    """The selection as positions, made in one of the three ways."""
    q, weights, _, first, last = (jnp.asarray(x) for x in case())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selecting, "_BLOCK_BYTES", block_bytes)
        patch.setattr(selecting, "WINDOW", 8)
        patch.setattr(selection, "FEW_QUERIES", T if way == "few" else 0)
        patch.setattr(selection, "MASK_RATIO", S if way == "mask" else 0)
        selected = select(q, weights, rows, layer, pages, first, last, k)
    assert selection.is_mask(selected) is (way == "mask" or k >= S)
    return selection.positions(selected, k)


def contiguous():
    return Rows(jnp.asarray(case()[2]))


def paged():
    """The same keys in shuffled pages, what lies in other pages is NaN."""
    pages = S // A
    table = np.random.default_rng(1).permutation(B * pages + 3)[: B * pages].reshape(B, pages).astype(np.int32)
    values = np.full((L, B * pages + 3, A, J), np.nan, np.float32)
    values[:, table] = case()[2].reshape(L, B, pages, A, J)
    return Rows(jnp.asarray(values)), jnp.asarray(table)


WHOLE = 1 << 30


WAYS = ["few", "mask", "positions"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [1, 5, 23])
def test_the_best_scores_are_selected(k, way):
    for layer in range(L):
        np.testing.assert_array_equal(run(WHOLE, contiguous(), layer, None, k, way), expected(layer, k))


@pytest.mark.parametrize(
    ("queries", "length", "k", "mask"),
    [
        (1, 64, 64, True),  # everything is selected
        (1, 65, 64, False),  # decode and verification gather
        (8, 65, 64, False),
        (9, 65, 64, True),  # prefill masks
        (9, 1024, 64, True),
        (9, 1025, 64, False),  # until the context is much longer than the selection
    ],
)
def test_the_form_follows_the_number_of_queries_and_rows(queries, length, k, mask):
    shapes = ((1, queries, I, J), (1, queries, I), (1, 1, length, J), (1, queries), (1, queries))
    dtypes = [jnp.float32] * 3 + [jnp.int32] * 2
    q, weights, keys, first, last = (jax.ShapeDtypeStruct(*of) for of in zip(shapes, dtypes, strict=True))
    op = lambda q, w, keys, first, last: select(q, w, Rows(keys), 0, None, first, last, k)  # noqa: E731
    found = jax.eval_shape(op, q, weights, keys, first, last)
    assert (found.dtype == jnp.bool_) is mask
    assert found.shape == (1, queries, length if mask else k)
    nothing = selection.nothing(1, queries, length, k)
    assert (nothing.shape, nothing.dtype) == (found.shape, found.dtype)
    assert not np.any(selection.positions(nothing, k) >= 0)


def test_a_mask_and_its_positions_are_the_same_selection():
    mask = selection.mask(jnp.asarray(expected(0, 5)), S)
    np.testing.assert_array_equal(selection.positions(mask, 5), expected(0, 5))


def test_scores_may_be_negative_and_are_often_tied():
    q, weights, keys, _, _ = case()
    score = scores(q, weights, keys[0])
    assert np.mean(score < 0) > 0.2
    assert np.mean([len(np.unique(row)) for row in score.reshape(-1, S)]) < 0.8 * S
    np.testing.assert_array_equal(index_scores(*(jnp.asarray(x) for x in (q, weights, keys[0]))), score)


def test_scores_of_bfloat16_queries_and_keys_are_summed_in_float32():
    rng = np.random.default_rng(2)
    q, keys = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 3, 8, 128), (1, 40, 128)))
    weights = jnp.asarray(rng.standard_normal((1, 3, 8)), jnp.float32)
    got = index_scores(q, weights, keys)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, scores(q, weights, keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("way", ["mask", "positions"])
def test_blocks_of_queries_select_what_one_block_does(queries, way):
    per_query = 16 * B * max(4 * I * 8, S)
    for bytes_per_block in (queries * per_query, (2 * queries - 1) * per_query):
        got = run(bytes_per_block, contiguous(), 1, None, 5, way)
        np.testing.assert_array_equal(got, expected(1, 5))


@pytest.mark.parametrize("way", WAYS)
def test_shuffled_pages_select_what_contiguous_rows_do(way):
    rows, table = paged()
    for layer in range(L):
        np.testing.assert_array_equal(run(WHOLE, rows, layer, table, 5, way), expected(layer, 5))


@pytest.mark.parametrize("window", [1, 3, 8, 16, 23])
@pytest.mark.parametrize("k", [1, 5, 23])
def test_few_queries_pass_over_windows_of_keys_and_select_the_same(window, k, monkeypatch):
    """Windows that divide the capacity or not, below and above k, contiguous and of whole shuffled pages."""
    monkeypatch.setattr(selecting, "_STRETCH", window)
    q, weights, _, first, last = (jnp.asarray(x) for x in case())
    for rows, table in ((contiguous(), None), paged()):
        found = jax.jit(lambda rows, table: select(q, weights, rows, 1, table, first, last, k))(rows, table)
        np.testing.assert_array_equal(found, expected(1, k))


@pytest.mark.parametrize("few", [T, 0])
def test_windows_beyond_the_last_visible_position_are_not_read(few, monkeypatch):
    monkeypatch.setattr(selecting, "_STRETCH", 4)
    monkeypatch.setattr(selecting, "WINDOW", 4)
    monkeypatch.setattr(selection, "FEW_QUERIES", few)
    q, weights, keys, first, _ = case()
    poisoned = np.array(keys)
    poisoned[:, :, 8:] = np.nan
    last = np.minimum(case()[4], 7)
    args = [jnp.asarray(x) for x in (q, weights)]
    bounds = [jnp.asarray(x) for x in (first, last)]
    clean, dirty = (select(*args, Rows(jnp.asarray(k)), 0, None, *bounds, 5) for k in (keys, poisoned))
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_keys_that_no_query_sees_are_not_noticed(poison, way):
    keys = np.array(case()[2])
    last = case()[4].max(axis=1)
    keys[1, np.arange(S) > last[:, None]] = poison
    np.testing.assert_array_equal(run(WHOLE, Rows(jnp.asarray(keys)), 1, None, 5, way), expected(1, 5))


@pytest.mark.parametrize("k", [S, S + 1, 10 * S])
def test_where_everything_visible_fits_all_of_it_is_selected_ascending(k):
    np.testing.assert_array_equal(run(WHOLE, contiguous(), 0, None, k), expected(0, k))


@pytest.mark.parametrize(("k", "scored"), [(S - 1, True), (S, False)])
def test_nothing_is_scored_where_everything_fits(k, scored):
    assert ("dot_general" in str(jax.make_jaxpr(functools.partial(run, WHOLE, k=k))(contiguous(), 0, None))) is scored


@pytest.mark.parametrize("k", [5, S])
def test_a_query_that_sees_nothing_selects_nothing(k):
    assert np.all(run(WHOLE, contiguous(), 0, None, k)[0, 0] == -1)


def test_the_layer_may_be_an_int_or_the_counter_of_a_scan():
    q, weights, _, first, last = (jnp.asarray(x) for x in case())
    at = lambda layer: selection.positions(select(q, weights, contiguous(), layer, None, first, last, 5), 5)  # noqa: E731
    _, both = jax.lax.scan(lambda _, layer: (None, at(layer)), None, jnp.arange(L))
    np.testing.assert_array_equal(both, [expected(layer, 5) for layer in range(L)])
    np.testing.assert_array_equal(at(1), both[1])


def test_scores_of_a_long_context_exist_for_a_block_of_queries_only():
    queries, length, limit = 256, 4096, 1 << 21

    def memory(block_bytes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selecting, "_BLOCK_BYTES", block_bytes)
            shapes = ((1, queries, I, J), (1, queries, I), (1, 1, length, J))
            q, weights, keys = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
            bound = jax.ShapeDtypeStruct((1, queries), jnp.int32)
            op = jax.jit(lambda q, w, keys, first, last: select(q, w, Rows(keys), 0, None, first, last, 8))
            return op.lower(q, weights, keys, bound, bound).compile().memory_analysis().temp_size_in_bytes

    assert memory(limit) < 2 * limit < memory(1 << 40)
