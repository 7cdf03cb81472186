"""Rows: an arena of pages that is written in place and read through page tables."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.pallas.rows import Rows

L, G, A, C = 3, 6, 4, 5
INT_MIN, INT_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max
append = jax.jit(Rows.append, donate_argnums=0)
gather, of_sequences = jax.jit(Rows.gather), jax.jit(Rows.of_sequences)


def arena(dtype=jnp.float32, shape=(L, G, A, C)):
    return Rows(jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype))


def new_rows(batch, queries):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, queries, C)), jnp.float32)


def written(values_LGAC, layer, rows_BTC, slots_BT):
    """The definition: one row at a time, slots out of range are skipped."""
    out = np.array(values_LGAC)
    _, pages, page_size, width = out.shape
    flat = out[layer].reshape(pages * page_size, width)
    for row, slot in zip(np.asarray(rows_BTC).reshape(-1, width), np.asarray(slots_BT).ravel(), strict=True):
        if 0 <= slot < len(flat):
            flat[slot] = row
    return out


def check_append(layer, slots_BT):
    slots_BT = np.asarray(slots_BT, np.int32)
    rows, new = arena(), new_rows(*slots_BT.shape)
    want = written(rows.values_LGAC, layer, new, slots_BT)
    np.testing.assert_array_equal(append(rows, layer, new, slots_BT).values_LGAC, want)


def test_zeros_are_what_they_say():
    rows = Rows.zeros(L, G, A, C, jnp.bfloat16)
    assert rows.values_LGAC.shape == (L, G, A, C)
    assert not np.any(rows.values_LGAC)
    assert (rows.page_size, rows.width, rows.row_bytes) == (A, C, 2 * C)


def test_rows_are_written_to_their_slots_of_their_layer_alone():
    for layer in range(L):
        check_append(layer, [[0, 1, 2], [23, 10, 7]])


@pytest.mark.parametrize("slot", [-1, -A, -A - 1, -G * A, G * A, G * A + 1, INT_MIN, INT_MIN + 1, INT_MAX])
def test_a_slot_out_of_range_drops_its_row_and_no_other(slot):
    for layer in range(L):
        check_append(layer, [[4, slot, 6], [slot, 0, 23]])


def test_where_every_slot_is_out_of_range_nothing_changes():
    check_append(1, [[-1, -1, G * A], [INT_MAX, INT_MIN, -2]])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    st.integers(0, L - 1), st.lists(st.integers(-2 * A, G * A + 2 * A), min_size=6, max_size=6, unique=True)
)
def test_any_distinct_slots_are_written_as_one_by_one(layer, slots):
    check_append(layer, np.reshape(slots, (2, 3)))


def test_rows_are_converted_to_the_stored_dtype():
    rows, new = arena(jnp.bfloat16), new_rows(1, 2)
    got = rows.append(1, new, jnp.array([[3, 9]])).values_LGAC
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[1, 2, 1], new[0, 1].astype(jnp.bfloat16))


def test_no_row_may_be_appended():
    check_append(0, np.zeros((2, 0)))


def test_a_donated_arena_is_consumed_and_written_in_place():
    rows = arena()
    append(rows, 1, new_rows(2, 3), jnp.arange(6).reshape(2, 3))
    assert rows.values_LGAC.is_deleted()


@pytest.mark.parametrize("scanned", [False, True])
def test_temporaries_of_an_append_do_not_grow_with_the_arena(scanned):
    def write(rows, new, slots):
        if not scanned:
            return rows.append(1, new, slots)
        return jax.lax.scan(lambda rows, layer: (rows.append(layer, new, slots), None), rows, jnp.arange(L))[0]

    def memory(pages):
        rows = jax.eval_shape(functools.partial(Rows.zeros, L, pages, A, 64, jnp.float32))
        shapes = (jax.ShapeDtypeStruct((2, 3, 64), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.int32))
        return jax.jit(write, donate_argnums=0).lower(rows, *shapes).compile().memory_analysis()

    small, large = memory(64), memory(128)
    assert large.temp_size_in_bytes == small.temp_size_in_bytes
    assert large.alias_size_in_bytes == 4 * L * 128 * A * 64  # the result is the donated arena
    assert large.temp_size_in_bytes < 16 << 10


@pytest.fixture
def paged():
    """The same rows as one page per sequence and as shuffled pages, the others filled with NaN."""
    batch, pages = 2, 3
    contiguous = arena(shape=(L, batch, pages * A, C))
    table = np.random.default_rng(2).permutation(11)[: batch * pages].reshape(batch, pages).astype(np.int32)
    values = np.full((L, 11, A, C), np.nan, np.float32)
    values[:, table] = np.asarray(contiguous.values_LGAC).reshape(L, batch, pages, A, C)
    return contiguous, Rows(jnp.asarray(values)), jnp.asarray(table)


def test_capacity_is_what_the_pages_hold(paged):
    contiguous, rows, table = paged
    assert contiguous.capacity(None) == rows.capacity(table) == 12


def test_rows_of_sequences_through_shuffled_pages_are_the_contiguous_ones(paged):
    contiguous, rows, table = paged
    for layer in (0, jnp.int32(2)):
        np.testing.assert_array_equal(of_sequences(rows, layer, table), contiguous.values_LGAC[layer])
        np.testing.assert_array_equal(of_sequences(contiguous, layer, None), contiguous.values_LGAC[layer])


def test_gathered_rows_through_shuffled_pages_are_the_contiguous_ones(paged):
    contiguous, rows, table = paged
    position = np.random.default_rng(3).integers(0, 12, (2, 5, 7)).astype(np.int32)
    for layer in range(L):
        want = np.asarray(contiguous.values_LGAC)[layer, np.arange(2)[:, None, None], position]
        np.testing.assert_array_equal(gather(rows, layer, table, jnp.asarray(position)), want)
        np.testing.assert_array_equal(gather(contiguous, layer, None, jnp.asarray(position)), want)


def test_two_sequences_may_share_pages(paged):
    contiguous, rows, table = paged
    shared = jnp.stack([table[0], jnp.array([table[0, 0], table[1, 1], table[1, 2]])])
    got = of_sequences(rows, 1, shared)
    np.testing.assert_array_equal(got[1, :A], contiguous.values_LGAC[1, 0, :A])
    np.testing.assert_array_equal(got[1, A:], contiguous.values_LGAC[1, 1, A:])
    position = jnp.array([[[0, 5]], [[0, 5]]])
    np.testing.assert_array_equal(gather(rows, 1, shared, position), got[:, None, jnp.array([0, 5])])


def test_what_is_appended_through_slots_is_read_through_pages(paged):
    contiguous, rows, table = paged
    start, new = np.array([3, 7]), new_rows(2, 5)  # across two page boundaries
    position = start[:, None] + np.arange(5)
    slots = np.take_along_axis(np.asarray(table), position // A, axis=1) * A + position % A
    got = append(rows, 2, new, jnp.asarray(slots, jnp.int32))
    want = np.array(contiguous.values_LGAC[2])
    want[np.arange(2)[:, None], position] = new
    np.testing.assert_array_equal(of_sequences(got, 2, table), want)
    np.testing.assert_array_equal(gather(got, 2, table, jnp.asarray(position[..., None]))[:, :, 0], new)


def test_gradients_of_gathered_rows_add_up_where_a_row_is_read_twice(paged):
    _, rows, table = paged
    position = jnp.array([[[0, 0, 5]], [[11, 4, 11]]])
    total = lambda values: jnp.sum(Rows(values).gather(1, table, position))  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(total))(jnp.nan_to_num(rows.values_LGAC)))
    assert gradient.sum() == 6 * C
    np.testing.assert_array_equal(gradient[1, table[0, 0], 0], np.full(C, 2))
    np.testing.assert_array_equal(gradient[1, table[1, 2], 3], np.full(C, 2))
