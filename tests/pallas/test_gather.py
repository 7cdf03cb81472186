"""Gathered rows: the reference against indexing, the Hopper kernel, interpreted, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.pallas.gather import reference
from glmjax.pallas.rows import Rows

L, G, A = 3, 5, 32


@pytest.fixture(scope="module")
def kernel():
    from glmjax.pallas import gather_mosaic

    return gather_mosaic


@pytest.fixture(scope="module")
def interpreted(kernel):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return jax.jit(functools.partial(kernel.mosaic, interpret=plgpu.InterpretGPUParams()))


def arena(width, dtype=jnp.bfloat16, shape=(L, G, A)):
    return Rows(jnp.asarray(np.random.default_rng(0).standard_normal((*shape, width)), dtype))


def slots(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-1, G * A, count), jnp.int32)


def indexed(rows, layer, slot_K):
    """The definition: NumPy's indexing of the layer's rows, zeros for −1."""
    row_SC, slot_K = np.asarray(rows.values_LGAC)[layer].reshape(-1, rows.width), np.asarray(slot_K)
    return np.where(slot_K[:, None] >= 0, row_SC[slot_K], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_the_reference_is_indexing(count, dtype):
    rows, slot_K = arena(10, dtype), slots(count)
    for layer in range(L):
        got = reference(rows, layer, slot_K)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, indexed(rows, layer, slot_K))


def test_where_nothing_is_selected_zeros_come_whatever_the_rows_hold():
    rows = Rows(jnp.full((1, 1, A, 64), jnp.nan, jnp.bfloat16))
    assert not np.any(reference(rows, 0, jnp.full(5, -1, jnp.int32)))


@pytest.mark.parametrize(("width", "count"), [(64, 64), (128, 192), (576, 64)])
def test_the_interpreted_kernel_is_the_reference(interpreted, width, count):
    rows = arena(width)
    for layer in (0, L - 1):
        slot_K = slots(count, layer)
        got, want = interpreted(rows, jnp.int32(layer), slot_K), reference(rows, layer, slot_K)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_the_interpreted_kernel_takes_a_row_again_and_again_the_last_one_and_none(interpreted):
    rows, last = arena(64), G * A - 1
    for slot_K in ([0] * 64, [last] * 64, [-1] * 64, [last, -1, 0, 0] * 16, list(range(last, last - 64, -1))):
        slot_K = jnp.asarray(slot_K, jnp.int32)
        np.testing.assert_array_equal(interpreted(rows, 1, slot_K), indexed(rows, 1, slot_K))


def test_the_interpreted_kernel_does_not_notice_what_no_slot_names(interpreted):
    slot_K = jnp.asarray([3, -1] * 32, jnp.int32)
    rows = arena(64, shape=(1, 1, A))
    poisoned = Rows(jnp.full_like(rows.values_LGAC, jnp.nan).at[0, 0, 3].set(rows.values_LGAC[0, 0, 3]))
    np.testing.assert_array_equal(interpreted(poisoned, 0, slot_K), indexed(rows, 0, slot_K))


@pytest.mark.parametrize(
    ("shape", "dtype", "count", "supported"),
    [
        ((78, 512, 64, 576), jnp.bfloat16, 2048, True),
        ((78, 1, 131072, 128), jnp.bfloat16, 64, True),
        ((1, 1, 64, 1792), jnp.bfloat16, 64, True),
        ((1, 1, 64, 1856), jnp.bfloat16, 64, False),  # beyond shared memory
        ((1, 1, 64, 576), jnp.float32, 64, False),
        ((1, 1, 64, 100), jnp.bfloat16, 64, False),  # no whole tile
        ((1, 1, 64, 576), jnp.bfloat16, 100, False),  # likewise
        ((1, 1, 64, 576), jnp.bfloat16, 0, False),
        ((2**10, 2**11, 2**10, 64), jnp.bfloat16, 64, False),  # beyond 32-bit row numbers
    ],
)
def test_the_kernel_says_what_it_supports(kernel, shape, dtype, count, supported):
    answers = []
    abstract = Rows(jax.ShapeDtypeStruct(shape, dtype)), jax.ShapeDtypeStruct((count,), jnp.int32)
    jax.eval_shape(lambda rows, slot_K: answers.append(kernel.supports(rows, 0, slot_K)), *abstract)
    assert answers == [supported]
