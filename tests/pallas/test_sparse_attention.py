"""sparse_attention: the masked and the gathered way, against float64 NumPy and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.pallas import blocks, selection
from glmjax.pallas.rows import Rows
from glmjax.pallas.sparse_attention import sparse_attention

B, T, N, R, C, S, K = 2, 5, 3, 6, 8, 24, 7
L, A = 2, 4  # layers; positions in a page
SCALE = 0.3
WAYS = ["masked", "gathered"]  # by the form of the selection
WHOLE = 1 << 30


@functools.partial(jax.jit, static_argnames=("way", "block_bytes"))
def attend(q, rows, pages, selected, *, layer=1, way, block_bytes=WHOLE):
    """The op with the selection's form and the sizes of blocks and windows fixed while it is traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        patch.setattr(blocks, "WINDOW", 10)  # does not divide S
        selected = selection.mask(selected, S) if way == "masked" else selected
        return sparse_attention(q, rows, layer, pages, selected, SCALE, R)


@functools.partial(jax.jit, static_argnames="way")
def gradients(q, values, selected, dy, dlse, *, way):
    """Of Σ dy · output + Σ dlse · lse with respect to queries and rows; lse of an empty selection is left out."""

    def loss(q, values):
        y, lse = attend(q, Rows(values), None, selected, way=way)
        return jnp.sum(y * dy) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * dlse)

    return jax.grad(loss, argnums=(0, 1))(q, values)


def normal(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def case(dtype=jnp.float32):
    return normal((B, T, N, C), 0, dtype), normal((L, B, S, C), 1, dtype)


def selections():
    """Distinct positions ascending, −1 after them: none, one, the ends, everything that fits, and in between."""
    rng = np.random.default_rng(2)
    out = np.full((B, T, K), -1, np.int32)
    for (b, t), count in zip(np.ndindex(B, T), (0, 1, 3, K, 2, K, 5, 1, 0, 6), strict=True):
        out[b, t, :count] = np.sort(rng.permutation(S)[:count])
    out[0, 2, :2] = 0, S - 1
    out[0, 2, :3].sort()
    return jnp.asarray(out)


def expected(q, values, selected, layer=1):
    q, values = np.asarray(q, np.float64), np.asarray(values, np.float64)[layer]
    y, lse = np.zeros((*q.shape[:3], R)), np.full(q.shape[:3], -np.inf)
    for b, t in np.ndindex(q.shape[:2]):
        picked = values[b, [p for p in np.asarray(selected[b, t]) if p >= 0]]
        if len(picked):
            scores = q[b, t] @ picked.T * SCALE
            best = scores.max(axis=-1, keepdims=True)
            lse[b, t] = (best + np.log(np.exp(scores - best).sum(axis=-1, keepdims=True)))[:, 0]
            y[b, t] = np.exp(scores - lse[b, t, :, None]) @ picked[:, :R]
    return y, lse


def assert_close(got, want, atol=2e-6):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=2e-6, atol=atol)


def paged(values):
    """The same rows in shuffled pages; no row of other pages is readable without a NaN."""
    pages = S // A
    table = np.random.default_rng(3).permutation(B * pages + 3)[: B * pages].reshape(B, pages).astype(np.int32)
    out = np.full((L, B * pages + 3, A, C), np.nan, np.float32)
    out[:, table] = np.asarray(values).reshape(L, B, pages, A, C)
    return Rows(jnp.asarray(out)), jnp.asarray(table)


@pytest.mark.parametrize("way", WAYS)
def test_output_and_lse_are_the_softmax_over_the_selected_rows(way):
    q, values = case()
    for layer in range(L):
        got = attend(q, Rows(values), None, selections(), layer=layer, way=way)
        assert (got[0].shape, got[1].shape) == ((B, T, N, R), (B, T, N))
        assert_close(got, expected(q, values, selections(), layer))


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_rounded_in_weights_and_output_alone(way):
    q, values = case(jnp.bfloat16)
    y, lse = attend(q, Rows(values), None, selections(), way=way)
    assert (y.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    want_y, want_lse = expected(q, values, selections())
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), want_y, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_is_selected_there_are_zeros_and_minus_infinity(way):
    q, values = case()
    y, lse = attend(q, Rows(values), None, jnp.full((B, T, K), -1), way=way)
    assert not np.any(y)
    assert np.all(lse == -np.inf)


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_is_selected_gradients_are_zero(way):
    q, values = case()
    none = jnp.full((B, T, K), -1)
    y_cotangent, lse_cotangent = jnp.ones((B, T, N, R)), jnp.ones((B, T, N))
    dq, dvalues = gradients(q, values, none, y_cotangent, lse_cotangent, way=way)
    assert np.all(np.asarray(dq) == 0)
    assert np.all(np.asarray(dvalues) == 0)


@pytest.mark.parametrize("way", WAYS)
def test_one_selected_row_returns_its_latent_exactly(way):
    q, values = case()
    position = np.random.default_rng(4).integers(0, S, (B, T))
    selected = jnp.asarray(np.where(np.arange(K) == 0, position[..., None], -1), jnp.int32)
    y, lse = attend(q, Rows(values), None, selected, way=way)
    latent = np.asarray(values)[1, np.arange(B)[:, None], position]
    np.testing.assert_array_equal(y, np.broadcast_to(latent[:, :, None, :R], y.shape))
    want = SCALE * np.einsum("btnc,btc->btn", np.asarray(q, np.float64), latent)
    np.testing.assert_allclose(lse, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_huge_scores_neither_overflow_nor_underflow(way):
    q, values = case()
    for factor in (1e4, -1e4):
        got = attend(factor * q, Rows(values), None, selections(), way=way)
        want = expected(np.float32(factor) * q, values, selections())
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
        np.testing.assert_allclose(got[0], want[0], atol=2e-2)


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_a_selection_and_where_its_gaps_are_do_not_matter(way):
    q, values = case()
    got = attend(q, Rows(values), None, selections()[..., ::-1], way=way)
    assert_close(got, expected(q, values, selections()))


@pytest.mark.parametrize("way", WAYS)
def test_shuffled_pages_give_what_contiguous_rows_do(way):
    q, values = case()
    rows, table = paged(values)
    got = attend(q, rows, table, selections(), way=way)
    assert_close(got, expected(q, values, selections()))


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_queries_give_what_one_block_does(way):
    q, values = case()
    per_query = {"masked": 4 * B * N * 10, "gathered": B * K * (4 * C + 4 * N)}[way]
    for queries in (1, 2):
        got = attend(q, Rows(values), None, selections(), way=way, block_bytes=queries * per_query)
        assert_close(got, expected(q, values, selections()))


def test_both_ways_have_the_gradients_of_the_definition():
    """Finite differences in float64, and the ways against each other; rows nobody selected have none."""
    q, values = case()
    dy, dlse = np.asarray(normal((B, T, N, R), 5)), np.asarray(normal((B, T, N), 6))

    def loss(q, values):
        y, lse = expected(q, values, selections())
        return np.sum(y * dy) + np.sum(np.where(np.isfinite(lse), lse, 0) * dlse)

    masked, gathered = (gradients(q, values, selections(), dy, dlse, way=way) for way in WAYS)
    assert_close(masked, gathered)
    dq, dvalues = (np.asarray(x, np.float64) for x in gathered)
    rng, step = np.random.default_rng(7), 1e-4
    for _ in range(5):
        u, v = rng.standard_normal(q.shape), rng.standard_normal(values.shape)
        q64, values64 = np.asarray(q, np.float64), np.asarray(values, np.float64)
        slope = (loss(q64 + step * u, values64 + step * v) - loss(q64 - step * u, values64 - step * v)) / (2 * step)
        np.testing.assert_allclose(np.sum(dq * u) + np.sum(dvalues * v), slope, rtol=1e-6, atol=1e-5)
    chosen = np.zeros((B, S + 1), bool)
    chosen[np.arange(B)[:, None, None], np.asarray(selections())] = True
    assert not np.any(dvalues[0])
    assert not np.any(dvalues[1][~chosen[:, :S]])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_pass_blocks_of_queries(way):
    q, values = case()
    loss = lambda q, size: jnp.sum(attend(q, Rows(values), None, selections(), way=way, block_bytes=size)[0] ** 2)  # noqa: E731
    gradient = jax.grad(loss)
    np.testing.assert_allclose(gradient(q, 1), gradient(q, WHOLE), atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_query_without_selection_does_not_poison_the_gradients_of_the_others(way):
    q, values = case()
    dq, dvalues = gradients(q, values, selections(), normal((B, T, N, R), 5), normal((B, T, N), 6), way=way)
    assert np.all(np.isfinite(dq))
    assert np.all(np.isfinite(dvalues))
    assert not np.any(dq[0, 0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_a_row_holds_that_no_query_selects_is_not_noticed(way, poison):
    """Row 0 (of the MTP layer: never written) and rows of a page that another sequence left behind."""
    q, values = case()
    selected = jnp.where(selections() >= 0, jnp.arange(1, K + 1), -1)
    poisoned = values.at[:, :, 0].set(poison).at[:, :, K + 1 :].set(poison)
    got = attend(q, Rows(poisoned), None, selected, way=way)
    assert_close(got, expected(q, values, selected))
    dy, dlse = normal((B, T, N, R), 5), normal((B, T, N), 6)
    got, want = (gradients(q, v, selected, dy, dlse, way=way) for v in (poisoned, values))
    assert_close(got, want)


def test_windows_that_no_query_selects_are_not_read():
    """A row of such a window may be anything without a trace, its neighbours in a selected window are zeroed."""
    q, values = case()
    inside = jnp.where(selections() >= 0, selections() % 10 + 10, -1)  # windows 0 and 2 hold nothing
    hlo = attend.lower(q, Rows(values), None, inside, way="masked").compile()
    poisoned = values.at[:, :, :10].set(np.nan).at[:, :, 20:].set(np.nan)
    for v in (values, poisoned):
        assert np.all(np.isfinite(hlo(q, Rows(v), None, inside)[0]))


def test_one_query_and_many_agree():
    q, values = case()
    many = attend(q, Rows(values), None, selections(), way="masked")
    for t in range(T):
        one = attend(q[:, t : t + 1], Rows(values), None, selections()[:, t : t + 1], way="gathered")
        assert_close([x[:, 0] for x in one], [x[:, t] for x in many])
