"""Stack: an entry of plain weights is the slice, one of FP8 weights its dequantisation by blocks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glmjax.pallas.stack import Stack, take

at = jax.jit(Stack.at, static_argnames="dtype")
FP8 = [  # shape of the values, block: with and without partial edges, one scale per letter's block
    ((2, 5, 7), (1, 1, 1)),
    ((3, 9, 8), (1, 4, 4)),
    ((2, 3, 5), (1, 128, 128)),
    ((2, 576, 257), (1, 128, 128)),
    ((2, 4, 6, 7), (1, 2, 4, 3)),
    ((2, 3, 2, 6, 5), (1, 1, 1, 4, 2)),
]


def plain(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def quantised(shape, block, seed=0):
    """Random bits of finite e4m3fn numbers, and scales of any magnitude."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 127, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
    scale = rng.lognormal(0, 3, [-(-n // b) for n, b in zip(shape, block, strict=True)])
    return Stack(jnp.asarray(bits), jnp.asarray(scale, jnp.float32), block)


def dequantised(stack):
    """W[i, j, …] = q[i, j, …] · s[i // b_i, j // b_j, …]: exact in float64, rounded once."""
    values = np.asarray(stack.values).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    index = np.ix_(*(np.arange(n) // b for n, b in zip(values.shape, stack.block, strict=True)))
    return (values * np.asarray(stack.scale, np.float64)[index]).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_entry_of_plain_values_is_the_slice(dtype):
    values = plain((3, 4, 2, 5), dtype)
    for layer in range(3):
        got = Stack(values).at(layer)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, values[layer])
        for expert in range(4):
            np.testing.assert_array_equal(Stack(values).at(layer, expert), values[layer, expert])


def test_indices_may_be_traced():
    values, fp8 = plain((3, 4, 2, 5)), quantised((3, 4, 6, 5), (1, 1, 4, 2))
    for layer in range(3):
        np.testing.assert_array_equal(at(Stack(values), layer), values[layer])
        for stack, want in ((Stack(values), values), (fp8, dequantised(fp8))):
            np.testing.assert_array_equal(at(stack, layer, 3 - layer), want[layer, 3 - layer])


def test_indices_may_be_numpy_integers_and_the_counter_of_a_loop():
    values = plain((3, 2, 5))
    np.testing.assert_array_equal(Stack(values).at(np.int64(2)), values[2])
    total = jax.lax.fori_loop(0, 3, lambda layer, total: total + Stack(values).at(layer), jnp.zeros((2, 5)))
    np.testing.assert_allclose(total, np.sum(values, axis=0), rtol=1e-6, atol=1e-6)


def test_traced_indices_beyond_the_stack_are_clamped():
    values = plain((3, 2))
    np.testing.assert_array_equal(jax.jit(take)(values, jnp.int32(7)), values[2])


def test_plain_values_are_converted_on_request():
    got = Stack(plain((2, 3))).at(1, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, plain((2, 3)).astype(jnp.bfloat16)[1])


@pytest.mark.parametrize(("shape", "block"), FP8)
def test_an_entry_of_fp8_values_is_its_dequantisation(shape, block):
    stack = quantised(shape, block)
    for layer in range(shape[0]):
        got = at(stack, layer)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, dequantised(stack)[layer])


def test_fp8_entries_of_experts_are_indexed_in_values_and_scale_alike():
    stack = quantised((2, 3, 2, 6, 5), (1, 1, 1, 4, 2))
    for layer, expert in np.ndindex(2, 3):
        np.testing.assert_array_equal(at(stack, layer, expert), dequantised(stack)[layer, expert])


def test_fp8_is_multiplied_in_float32_and_rounded_last():
    stack = quantised((2, 9, 5), (1, 4, 2))
    got = at(stack, 1, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, dequantised(stack)[1].astype(jnp.bfloat16))


def test_every_fp8_number_survives_zeros_denormals_and_nan_included():
    stack = Stack(jnp.arange(256, dtype=jnp.uint8)[None], jnp.full((1, 2), 0.5, jnp.float32), (1, 128))
    got = np.asarray(at(stack, 0))
    np.testing.assert_array_equal(got, dequantised(stack)[0])
    assert np.flatnonzero(np.isnan(got)).tolist() == [127, 255]
    assert np.max(got[np.isfinite(got)]) == 224


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_scale_of_another_length_is_refused(rows):
    values = jnp.zeros((2, 9, 6), jnp.uint8)
    with pytest.raises(
        ValueError, match=rf"scale \(2, {rows}, 2\) does not cover values \(2, 9, 6\) in blocks \(1, 4, 3\)"
    ):
        Stack(values, jnp.ones((2, rows, 2)), (1, 4, 3)).at(0)
    with pytest.raises(ValueError, match="does not cover"):
        Stack(values, jnp.ones((2, rows, 6)), (1, 1, 1)).at(0)


@pytest.mark.parametrize("block", [(), (4, 3), (1, 4), (1, 4, 3, 1)])
def test_a_block_that_has_not_one_width_per_dimension_is_refused(block):
    with pytest.raises(ValueError, match="does not cover"):
        Stack(jnp.zeros((2, 9, 6), jnp.uint8), jnp.ones((2, 3, 2)), block).at(0)


def test_the_gradient_of_an_entry_is_zero_elsewhere():
    gradient = jax.jit(jax.grad(lambda values, layer: jnp.sum(Stack(values).at(layer) ** 2)))
    values = plain((3, 2, 5))
    want = np.zeros_like(values)
    want[1] = 2 * values[1]
    np.testing.assert_allclose(gradient(values, 1), want)


def test_an_fp8_stack_is_never_converted_whole():
    layers, shape = 64, (64, 64)
    stack = quantised((layers, *shape), (1, 16, 16))
    compiled = jax.jit(lambda stack, layer, x: stack.at(layer) @ x).lower(stack, 3, jnp.zeros(64)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 64 * 64
