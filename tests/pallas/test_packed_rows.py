"""FP8 rows: as near as e4m3 allows, the rotary part as near as bfloat16 does, and in FlashMLA's layout."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glmjax.pallas.packed_rows import PackedRows
from glmjax.pallas.rows import Rows

packed = jax.jit(PackedRows.pack, static_argnums=0)
unpacked = jax.jit(PackedRows.unpack, static_argnums=0)


def rows(shape, seed=0, scale=1.0):
    return np.float32(scale * np.random.default_rng(seed).standard_normal(shape))


def test_sizes_of_glm_5_are_those_of_flash_mla():
    assert PackedRows(576, 64, jnp.bfloat16).bytes == 656
    assert PackedRows(128, 0, jnp.bfloat16).bytes == 132


@pytest.mark.parametrize(("width", "exact"), [(576, 64), (128, 0), (129, 0), (200, 16), (80, 16), (5, 2), (1, 0)])
def test_numbers_come_back_as_near_as_their_format_allows(width, exact):
    how, given = PackedRows(width, exact, jnp.dtype("float32")), rows((3, 4, width))
    stored = packed(how, given)
    assert stored.dtype == jnp.uint8
    assert stored.shape == (3, 4, how.bytes)
    found = np.asarray(unpacked(how, stored))
    end = width - exact
    for begin in range(0, end, 128):
        tile, mine = given[..., begin : min(begin + 128, end)], found[..., begin : min(begin + 128, end)]
        largest = np.abs(tile).max(-1, keepdims=True)
        assert (np.abs(mine - tile) <= np.maximum(np.abs(tile) / 16, largest / 448 / 512) * 1.001).all()
        np.testing.assert_allclose(np.abs(mine).max(-1, keepdims=True), largest, rtol=1e-6)
    np.testing.assert_array_equal(found[..., end:], given[..., end:].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_bytes_are_numbers_then_scales_then_the_exact_ones():
    how, given = PackedRows(200, 4, jnp.dtype("float32")), rows((200,))
    stored = np.asarray(packed(how, given))
    scales = stored[196 : 196 + 8].view(np.float32)
    np.testing.assert_allclose(scales, [np.abs(given[:128]).max() / 448, np.abs(given[128:196]).max() / 448], rtol=1e-6)
    numbers = stored[:196].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_allclose(numbers[:128] * scales[0], unpacked(how, stored)[:128], rtol=1e-6)
    np.testing.assert_array_equal(stored[-8:].view(ml_dtypes.bfloat16), given[196:].astype(ml_dtypes.bfloat16))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(power=st.integers(-30, 30), zero=st.booleans())
def test_a_row_of_any_size_keeps_its_size(power, zero):
    how, given = PackedRows(128, 0, jnp.dtype("float32")), rows((128,), scale=0.0 if zero else 2.0**power)
    found = np.asarray(unpacked(how, packed(how, given)))
    assert np.abs(found - given).max() <= np.abs(given).max() / 16


def test_what_is_packed_twice_is_what_is_packed_once():
    how, given = PackedRows(80, 16, jnp.dtype("float32")), rows((7, 80))
    once = packed(how, given)
    again = packed(how, unpacked(how, once))
    np.testing.assert_allclose(unpacked(how, again), unpacked(how, once), rtol=1e-6)


def test_an_arena_writes_and_reads_packed_rows():
    how, given = PackedRows(20, 4, jnp.dtype("float32")), rows((1, 3, 20))
    arena = Rows.zeros(2, 3, 4, 20, None, how)
    assert (arena.width, arena.row_bytes) == (20, how.bytes)
    arena = arena.append(1, jnp.asarray(given), jnp.array([[0, 5, 11]]))
    want = np.asarray(unpacked(how, packed(how, given)))[0]
    table = jnp.array([[0, 1, 2]])
    np.testing.assert_array_equal(arena.gather(1, table, jnp.array([[[0, 5, 11]]]))[0, 0], want)
    np.testing.assert_array_equal(arena.of_sequences(1, table)[0, [0, 5, 11]], want)
    np.testing.assert_array_equal(arena.window(1, table, jnp.int32(4), 8)[0, [1, 7]], want[1:])
    assert not np.any(arena.of_sequences(0, table))
