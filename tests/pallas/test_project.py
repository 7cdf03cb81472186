"""project: einsum with one layer's matrix, for every projection of the model."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glmjax.pallas.project import project
from glmjax.pallas.stack import Stack

SPECS = [
    "BTD,QD->BTQ",  # q_a, kv_a, the indexer's wk and weights_proj, the router
    "BTQ,NYQ->BTNY",  # q_b, the indexer's wq_b
    "BTNH,NHR->BTNR",  # absorbed keys
    "BTNR,NOR->BTNO",  # values of the selected latents' sum
    "BTNO,DNO->BTD",  # o
    "BTD,zFD->BTzF",  # gate and up
    "BTzD,EzD->BTE",  # MTP: [embedding | hidden]
    "BTD,VD->BTV",  # the head
]
SIZE = dict(zip("BTDQNYHRzOFEV", (2, 3, 8, 6, 3, 5, 4, 7, 2, 6, 10, 9, 11), strict=True))
LAYERS = 3


def normal(letters, seed, dtype=jnp.float32, lead=()):
    shape = (*lead, *(SIZE[a] for a in letters))
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(spec, dtype=jnp.float32):
    x, matrix, _ = spec.replace("->", ",").split(",")
    return normal(x, 0, dtype), normal(matrix, 1, dtype, lead=(LAYERS,))


def expected(spec, x, matrix):
    return np.einsum(spec, np.asarray(x, np.float64), np.asarray(matrix, np.float64))


def assert_close(got, want, dtype):
    """One rounding of the exact result; the sum in float32 adds little."""
    assert got.dtype == dtype
    rtol = 2**-8 if dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=3e-6)


@functools.partial(jax.jit, static_argnames=("spec", "out"))
def run(spec, x, weight, layer, out=None):
    return project(spec, x, weight, layer, out=out)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_the_result_is_the_exact_product_rounded_once(spec, dtype):
    x, stack = operands(spec, dtype)
    for layer in (0, LAYERS - 1):
        assert_close(run(spec, x, Stack(stack), layer), expected(spec, x, stack[layer]), dtype)


@pytest.mark.parametrize("spec", ["BTD,VD->BTV", "BTNH,NHR->BTNR"])
def test_a_float32_result_of_bfloat16_operands_is_not_rounded(spec):
    x, stack = operands(spec, jnp.bfloat16)
    got = run(spec, x, Stack(stack), 1, out=jnp.float32)
    assert_close(got, expected(spec, x, stack[1]), jnp.float32)


def test_weights_take_the_dtype_of_x():
    x, stack = operands("BTD,QD->BTQ")
    got = run("BTD,QD->BTQ", x.astype(jnp.bfloat16), Stack(stack), 1)
    want = expected("BTD,QD->BTQ", x.astype(jnp.bfloat16), stack[1].astype(jnp.bfloat16))
    assert_close(got, want, jnp.bfloat16)


@pytest.mark.parametrize("spec", ["BTNH,NHR->BTNR", "BTNR,NOR->BTNO"])
def test_bfloat16_runs_for_each_head_at_the_sizes_of_a_model(spec):
    """XLA on the CPU has no bfloat16 product with a float32 result for every layout, once operands are large enough."""
    x, matrix, _ = spec.replace("->", ",").split(",")
    size = {"B": 2, "T": 24, "N": 4, "H": 16, "R": 32, "O": 16}
    rng = np.random.default_rng(4)
    x, matrix = (jnp.asarray(rng.standard_normal([size[a] for a in letters]), jnp.bfloat16) for letters in (x, matrix))
    got = run(spec, x, Stack(matrix[None]), 0)
    want = expected(spec, x, matrix)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(spec, x, stack, dy):
    """The result for a layer that is an int, and the gradients of Σ dy · result."""
    y, vjp = jax.vjp(lambda x, stack: project(spec, x, Stack(stack), 1), x, stack)
    return y, *vjp(dy)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_einsum(spec):
    x, stack = operands(spec)
    left, right, result = spec.replace("->", ",").split(",")
    dy = normal(result, 2)
    y, dx, dstack = with_gradients(spec, x, stack, dy)
    assert_close(y, expected(spec, x, stack[1]), jnp.float32)
    assert_close(dx, expected(f"{result},{right}->{left}", dy, stack[1]), jnp.float32)
    assert_close(dstack[1], expected(f"{result},{left}->{right}", dy, x), jnp.float32)
    assert not np.any(dstack[::2])


def test_forward_mode_agrees_with_reverse_mode():
    x, stack = operands("BTNH,NHR->BTNR")
    f = jax.jit(lambda x: project("BTNH,NHR->BTNR", x, Stack(stack), 2))
    _, dy = jax.jvp(f, (x,), (jnp.ones_like(x),))
    (dx,) = jax.vjp(f, x)[1](jnp.ones_like(dy))
    np.testing.assert_allclose(np.sum(dy), np.sum(dx), rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def scanned(spec, x, stack, dy):
    """Every layer's projection of the same x in a scan over the layers, and the gradients of Σ dy · result."""

    def layers(x, stack):
        step = lambda _, layer: (None, project(spec, x, Stack(stack), layer))  # noqa: E731
        return jax.lax.scan(step, None, jnp.arange(LAYERS))[1]

    y, vjp = jax.vjp(layers, x, stack)
    return y, *vjp(dy)


@pytest.mark.parametrize("spec", SPECS)
def test_the_layer_may_be_the_counter_of_a_scan(spec):
    x, stack = operands(spec)
    left, right, result = spec.replace("->", ",").split(",")
    dy = normal(result, 2, lead=(LAYERS,))
    y, dx, dstack = scanned(spec, x, stack, dy)
    for layer in range(LAYERS):
        assert_close(y[layer], expected(spec, x, stack[layer]), jnp.float32)
        assert_close(dstack[layer], expected(f"{result},{left}->{right}", dy[layer], x), jnp.float32)
    want = sum(expected(f"{result},{right}->{left}", dy[layer], stack[layer]) for layer in range(LAYERS))
    np.testing.assert_allclose(dx, want, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "block"),
    [
        ("BTD,QD->BTQ", (1, 4, 3)),
        ("BTQ,NYQ->BTNY", (1, 1, 2, 4)),
        ("BTNH,NHR->BTNR", (1, 1, 3, 4)),
        ("BTNR,NOR->BTNO", (1, 1, 4, 2)),
        ("BTNO,DNO->BTD", (1, 3, 1, 6)),
        ("BTD,zFD->BTzF", (1, 1, 4, 8)),
    ],
)
def test_fp8_weights_are_dequantised_to_the_dtype_of_x(spec, block):
    dtype = jnp.bfloat16 if spec == "BTD,QD->BTQ" else jnp.float32
    x, like = operands(spec, dtype)
    rng = np.random.default_rng(3)
    bits = rng.integers(40, 72, like.shape, np.uint8) | (rng.integers(0, 2, like.shape, np.uint8) << 7)
    scale = rng.uniform(0.1, 1, [-(-n // b) for n, b in zip(like.shape, block, strict=True)]).astype(np.float32)
    index = np.ix_(*(np.arange(n) // b for n, b in zip(like.shape, block, strict=True)))
    matrix = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale[index]
    weight = Stack(jnp.asarray(bits), jnp.asarray(scale), block)
    assert_close(run(spec, x, weight, 1), expected(spec, x, matrix[1].astype(dtype)), dtype)


def test_no_token_gives_no_row():
    _, stack = operands("BTQ,NYQ->BTNY")
    assert project("BTQ,NYQ->BTNY", jnp.zeros((2, 0, SIZE["Q"])), Stack(stack), 0).shape == (2, 0, SIZE["N"], SIZE["Y"])


def test_a_layer_is_not_copied_before_it_is_needed():
    """A scan over many layers holds one layer's slice at most, never a converted or reordered stack."""
    layers, width = 64, 64
    x, stack = jnp.ones((1, 4, width)), jnp.ones((layers, width, width))

    def run(x, stack):
        step = lambda x, layer: (project("BTD,ED->BTE", x, Stack(stack), layer), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    memory = jax.jit(run).lower(x, stack).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * width * width
