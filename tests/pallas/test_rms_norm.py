"""RMSNorm: the reference against float64 NumPy, the Hopper kernel, interpreted, against the reference."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.pallas import dispatch
from glmjax.pallas.rms_norm import reference, rms_norm

EPS = 1e-5
DTYPES = [jnp.float32, jnp.bfloat16]


def expected(x, weight, eps=EPS):
    """The definition in float64, rounded to the dtype where model-spec.md says so."""
    x64 = np.asarray(x, np.float64)
    normed = (x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return (normed.astype(np.float64) * np.asarray(weight, np.float64)).astype(x.dtype)


def assert_close(got, want):
    """Equal up to float32's rounding, then at most one step of bfloat16 in a few elements next to a tie."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    tolerance = 5e-6 if want.dtype == np.float32 else 2**-7
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=tolerance, atol=0)
    if want.dtype != np.float32:
        assert np.sum(np.asarray(got) != want) <= 1 + want.size // 100


def rows(shape, dtype, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(6144,), (0, 64), (1, 6144), (3, 2048), (2, 5, 512), (7, 1), (4, 2), (3, 100), (1, 0, 128)]
)
def test_reference_is_the_definition_at_any_shape(shape, dtype):
    x, weight_LD = rows(shape, dtype), rows((3, shape[-1]), dtype, seed=1)
    assert_close(rms_norm(x, weight_LD, 2, eps=EPS), expected(x, weight_LD[2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-3, 1e3, 1e15])
def test_reference_is_the_definition_at_any_magnitude_whose_square_is_finite(scale, dtype):
    x, weight_LD = rows((5, 512), dtype, scale), rows((1, 512), dtype, seed=1)
    assert_close(rms_norm(x, weight_LD, 0, eps=EPS), expected(x, weight_LD[0]))


def test_one_huge_element_does_not_lose_the_small_ones():
    x = rows((1, 6144), jnp.float32, 1e-6).at[0, 17].set(1e6)
    assert_close(rms_norm(x, jnp.ones((1, 6144)), 0, eps=EPS), expected(x, np.ones(6144)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_row_stays_zero_and_a_row_whose_squares_overflow_becomes_zero(dtype):
    x = jnp.stack([jnp.zeros(256, dtype), jnp.full(256, 1e25, dtype)])
    assert not np.any(rms_norm(x, jnp.ones((1, 256), dtype), 0, eps=EPS))


def test_a_nan_stays_in_its_row():
    x = rows((3, 128), jnp.float32)
    y = rms_norm(x.at[1, 5].set(jnp.nan), jnp.ones((1, 128)), 0, eps=EPS)
    assert np.all(np.isnan(y[1]))
    np.testing.assert_array_equal(y[::2], rms_norm(x, jnp.ones((1, 128)), 0, eps=EPS)[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_is_inside_the_root(dtype):
    x, weight_LD = rows((4, 128), dtype, 1e-3), rows((1, 128), dtype, seed=1)
    assert_close(rms_norm(x, weight_LD, 0, eps=1e-6), expected(x, weight_LD[0], 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_the_dtype_comes_before_the_weight_under_jit_too(dtype):
    x, weight_LD = rows((64, 512), dtype), rows((1, 512), dtype, seed=1)
    assert_close(jax.jit(functools.partial(rms_norm, eps=EPS))(x, weight_LD, jnp.int32(0)), expected(x, weight_LD[0]))


def test_the_layer_may_be_the_counter_of_a_loop():
    x, weight_LD = rows((2, 64), jnp.float32), rows((4, 64), jnp.float32, seed=1)
    step = lambda layer, x: rms_norm(x, weight_LD, layer, eps=EPS)  # noqa: E731
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 4, step, x))(x)
    unrolled = functools.reduce(lambda x, layer: step(layer, x), range(4), x)
    np.testing.assert_allclose(looped, unrolled, rtol=1e-6)


def test_weights_of_another_dtype_and_layers_outside_of_the_stack_are_refused():
    x, weight_LD = rows((2, 64), jnp.float32), rows((4, 64), jnp.float32)
    with pytest.raises(ValueError, match="weight_LD is bfloat16 but x is float32; cast"):
        rms_norm(x, weight_LD.astype(jnp.bfloat16), 0, eps=EPS)
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=f"layer {layer} is outside of a stack of 4"):
            rms_norm(x, weight_LD, layer, eps=EPS)


def test_a_gradient_exists_for_the_reference():
    x, weight_LD = rows((2, 64), jnp.float32), rows((4, 64), jnp.float32)
    dx, dweight_LD = jax.grad(lambda x, w: rms_norm(x, w, 2, eps=EPS).sum(), argnums=(0, 1))(x, weight_LD)
    assert np.any(dx)
    np.testing.assert_array_equal(np.any(dweight_LD, axis=1), [False, False, True, False])


def test_on_the_cpu_pallas_gpu_is_never_imported():
    program = (
        "import sys, jax.numpy as jnp; from glmjax.pallas.rms_norm import rms_norm;"
        "rms_norm(jnp.ones((1, 128)), jnp.ones((1, 128)), 0, eps=1e-5);"
        "sys.exit('jax.experimental.pallas.mosaic_gpu' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.fixture(scope="module")
def kernel():
    from glmjax.pallas import rms_norm_mosaic

    return rms_norm_mosaic


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128,), (3, 384), (2, 2, 256), (1, 1024), (2, 2048)])
def test_the_interpreted_kernel_is_the_reference(kernel, shape, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x, weight_LD = rows(shape, dtype), rows((3, shape[-1]), dtype, seed=1)
    run = jax.jit(functools.partial(kernel.mosaic, eps=EPS, interpret=plgpu.InterpretGPUParams()))
    for layer in (0, 2):
        got, want = run(x, weight_LD, jnp.int32(layer)), reference(x, weight_LD, layer, eps=EPS)
        assert_close(got, np.asarray(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15, 1e25])
def test_the_interpreted_kernel_is_the_reference_at_any_magnitude(kernel, scale, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x, weight_LD = rows((1, 128), dtype, scale), rows((1, 128), dtype, seed=1)
    got = kernel.mosaic(x, weight_LD, 0, eps=EPS, interpret=plgpu.InterpretGPUParams())
    assert_close(got, np.asarray(reference(x, weight_LD, 0, eps=EPS)))


@pytest.mark.parametrize(
    ("shape", "dtype", "supported"),
    [
        ((1, 6144), jnp.bfloat16, True),
        ((512, 2048), jnp.bfloat16, True),
        ((3, 512), jnp.float32, True),
        ((3, 12288), jnp.float32, True),
        ((3, 12416), jnp.bfloat16, False),  # spills
        ((3, 100), jnp.bfloat16, False),  # no whole warpgroup
        ((0, 512), jnp.bfloat16, False),  # no row
        ((3, 512), jnp.float16, False),
        ((2**19, 6144), jnp.bfloat16, False),  # beyond 32-bit offsets
    ],
)
def test_the_kernel_says_what_it_supports(kernel, shape, dtype, supported):
    x, weight_LD = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, (2, shape[-1])))
    answers = []
    jax.eval_shape(lambda x, w: answers.append(kernel.supports(x, w, 0, eps=EPS)), x, weight_LD)
    assert answers == [supported]


def test_where_the_kernel_does_not_fit_the_reference_runs():
    x, weight_LD = rows((3, 100), jnp.float32), rows((1, 100), jnp.float32)
    with dispatch.implementation("mosaic"):
        got = rms_norm(x, weight_LD, 0, eps=EPS)
    np.testing.assert_array_equal(got, reference(x, weight_LD, 0, eps=EPS))
