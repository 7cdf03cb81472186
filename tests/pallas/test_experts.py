"""experts: the chosen experts of a mixture, against a loop over tokens and experts in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glmjax.pallas.experts import experts
from glmjax.pallas.stack import Stack

L, E, D, F = 2, 5, 6, 4
LAYER = jnp.int32(1)
run = jax.jit(experts)


def normal(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weights(dtype=jnp.float32):
    """Such that outputs are about as large as inputs."""
    return (0.4 * normal((L, E, 2, F, D), 0)).astype(dtype), (0.7 * normal((L, E, D, F), 1)).astype(dtype)


def chosen(tokens, per_token, skipped=()):
    """Random experts, now and then one of those to skip."""
    rng = np.random.default_rng(tokens + per_token)
    return jnp.asarray(rng.choice([*range(E), *skipped], (tokens, per_token)), jnp.int32)


def expected(x, gate_up, down, layer, choice, weight):
    x, gate_up, down, weight = (np.asarray(a, np.float64) for a in (x, gate_up[layer], down[layer], weight))
    y = np.zeros_like(x)
    for m, (experts_of_token, weights_of_token) in enumerate(zip(np.asarray(choice), weight, strict=True)):
        for e, w in zip(experts_of_token, weights_of_token, strict=True):
            if 0 <= e < len(down):
                gate, up = gate_up[e] @ x[m]
                y[m] += w * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return y


def check(choice, dtype=jnp.float32, layer=1, op=run):
    gate_up, down = weights(dtype)
    choice = jnp.asarray(choice, jnp.int32)
    x, weight = normal((len(choice), D), 2, dtype), normal(choice.shape, 3)
    y = op(x, Stack(gate_up), Stack(down), jnp.int32(layer), choice, weight)
    assert y.dtype == dtype
    want = expected(x, gate_up, down, layer, choice, weight)
    rtol, atol = (2e-5, 2e-5) if dtype == jnp.float32 else (2**-7, 2**-5 * np.max(np.abs(want)))
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=rtol, atol=atol)
    return np.asarray(y)


@pytest.mark.parametrize(("tokens", "per_token"), [(1, 1), (1, 3), (7, 3), (200, 3), (1000, 2)])
def test_every_token_gets_the_sum_of_its_experts(tokens, per_token):
    check(chosen(tokens, per_token))


def test_every_layer_has_its_own_experts():
    assert not np.any(check(chosen(7, 3), layer=0) == check(chosen(7, 3), layer=1))


@pytest.mark.parametrize(("tokens", "per_token"), [(1, 1), (7, 3), (200, 3)])
@pytest.mark.parametrize("expert", [0, E - 1])
def test_all_tokens_may_choose_one_expert(tokens, per_token, expert):
    check(np.where(np.arange(per_token) == 0, expert, np.full((tokens, 1), -1)))


def test_every_expert_may_be_chosen():
    check(np.arange(21).reshape(7, 3) % E)
    check(np.arange(600).reshape(200, 3) % E)


@pytest.mark.parametrize("count", [127, 128, 129, 255, 256, 257])
def test_groups_next_to_a_whole_number_of_blocks(count):
    """600 pairs make blocks of 128 rows: an expert with the count, and one with the rest."""
    check(np.where(np.arange(600) < count, 3, 1)[np.random.default_rng(0).permutation(600), None])


@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_choices_outside_the_experts_are_skipped(tokens):
    check(chosen(tokens, 3, skipped=(-1, E, E + 3, np.iinfo(np.int32).max, np.iinfo(np.int32).min)))


def test_a_token_that_chooses_no_expert_gets_zeros():
    y = check([[0, 1, 2], [-1, E, -1], [2, E + 3, 0], [-7, -1, E], *[[3, 4, -1]] * 3])
    assert not np.any(y[1])
    assert not np.any(y[3])


def test_where_no_token_chooses_an_expert_there_are_zeros():
    assert not np.any(check(np.full((7, 3), -1)))


def test_an_expert_chosen_twice_by_a_token_counts_twice():
    check([[2, 2, 2], [0, 2, 0], [1, 1, 3], *[[4, 4, -1]] * 4])


def test_no_tokens_are_no_work():
    y = run(jnp.zeros((0, D)), *map(Stack, weights()), LAYER, jnp.zeros((0, 3), jnp.int32), jnp.zeros((0, 3)))
    assert y.shape == (0, D)


def test_bfloat16_tokens_have_bfloat16_results():
    check(chosen(200, 3, skipped=(-1,)), jnp.bfloat16)


def test_a_sum_of_bfloat16_outputs_is_rounded_once():
    """1 + 64 · 2^-8 is lost where each term is rounded to bfloat16 on its own."""
    gate_up = jnp.ones((1, 2, 2, 1, 1), jnp.bfloat16) * 8
    down = jnp.ones((1, 2, 1, 1), jnp.bfloat16)
    swiglu = float(jax.nn.silu(jnp.bfloat16(8)) * 8)
    choice = jnp.zeros((1, 65), jnp.int32)
    weight = jnp.full((1, 65), 2**-8).at[0, 0].set(1) / jnp.float32(jnp.bfloat16(swiglu))
    y = run(jnp.ones((1, 1), jnp.bfloat16), Stack(gate_up), Stack(down), jnp.int32(0), choice, weight)
    np.testing.assert_allclose(np.float32(y), 1.25, rtol=2**-8)


@pytest.mark.parametrize(("dtype", "both"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_fp8_experts_are_their_dequantisations(dtype, both):
    rng = np.random.default_rng(4)

    def quantised(shape, block):
        bits = rng.integers(40, 72, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
        scale = rng.uniform(0.1, 1, [-(-n // b) for n, b in zip(shape, block, strict=True)]).astype(np.float32)
        index = np.ix_(*(np.arange(n) // b for n, b in zip(shape, block, strict=True)))
        plain = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale[index]
        return Stack(jnp.asarray(bits), jnp.asarray(scale), block), Stack(jnp.asarray(plain, dtype))

    gate_up = quantised((L, E, 2, F, D), (1, 1, 1, 3, 4))
    down = quantised((L, E, D, F), (1, 1, 4, 3))
    choice = chosen(7, 3, skipped=(-1, E))
    x, weight = normal((7, D), 2, dtype), normal((7, 3), 3)
    got = run(x, gate_up[0], down[0 if both else 1], LAYER, choice, weight)
    want = run(x, gate_up[1], down[1], LAYER, choice, weight)
    assert got.dtype == dtype
    # bfloat16: XLA may keep the float32 of a fused dequantisation.
    scale = float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(
        np.float32(got), np.float32(want), atol=scale * (1e-6 if dtype == jnp.float32 else 2**-6)
    )


def dense(x, gate_up, down, layer, choice, weight):
    """Every expert on every token, weighted by zero where it was not chosen."""
    gate_up_MEzF = jnp.einsum("md,ezfd->mezf", x, gate_up[layer])
    h_MEF = jax.nn.silu(gate_up_MEzF[:, :, 0]) * gate_up_MEzF[:, :, 1]
    weight_ME = jnp.einsum("mx,mxe->me", weight, jax.nn.one_hot(choice, E))  # nothing for choices outside
    return jnp.einsum("mef,edf,me->md", h_MEF, down[layer], weight_ME)


def sparse(x, gate_up, down, layer, choice, weight):
    return experts(x, Stack(gate_up), Stack(down), layer, choice, weight)


@functools.partial(jax.jit, static_argnums=0)
def gradients(op, x, gate_up, down, layer, choice, weight, dy):
    """Of Σ dy · output with respect to all that is continuous."""
    loss = lambda x, gate_up, down, weight: jnp.sum(op(x, gate_up, down, layer, choice, weight) * dy)  # noqa: E731
    return jax.grad(loss, argnums=(0, 1, 2, 3))(x, gate_up, down, weight)


def dense_gradients(x, gate_up, down, layer, choice, weight, dy):
    """Filled up to 200 tokens, to be compiled once."""
    tokens, per_token = choice.shape
    fill = lambda a, width, value=0: np.full((200, width), value, a.dtype)  # noqa: E731
    x_, dy_, choice_, weight_ = fill(x, D), fill(dy, D), fill(choice, 3, -1), fill(weight, 3)
    x_[:tokens], dy_[:tokens], choice_[:tokens, :per_token], weight_[:tokens, :per_token] = x, dy, choice, weight
    dx, dgate_up, ddown, dweight = gradients(dense, x_, gate_up, down, layer, choice_, weight_, dy_)
    return dx[:tokens], dgate_up, ddown, dweight[:tokens, :per_token]


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6 * (1 + float(jnp.max(jnp.abs(w)))))


@pytest.mark.parametrize(
    "choice",
    [
        [[0, 3, 2]],
        [[2, -1, E]],
        [[1, 1, 1]],
        chosen(200, 3),
        chosen(200, 3, skipped=(-1, E, E + 3)),
        np.full((200, 3), -1),
        np.full((200, 3), 4),
    ],
    ids=["one", "one with skipped", "one thrice", "many", "skipped", "all skipped", "one expert"],
)
def test_gradients_are_those_of_the_dense_mixture(choice):
    choice = jnp.asarray(choice, jnp.int32)
    x, dy = normal((len(choice), D), 2), normal((len(choice), D), 5)
    args = (x, *weights(), LAYER, choice, normal(choice.shape, 3), dy)
    got = gradients(sparse, *args)
    assert_same(got, dense_gradients(*args))
    assert not np.any(np.where((choice < 0) | (choice >= E), got[3], 0))
    assert not np.any(got[1][0])
    assert not np.any(got[2][0])


def test_gradients_pass_a_scan_over_layers():
    choice = jnp.stack([chosen(9, 3, skipped=(-1, E)), chosen(9, 3)[::-1]])

    @functools.partial(jax.jit, static_argnums=0)
    def through(op, x, gate_up, down, weight):
        def loss(x, gate_up, down, weight):
            def layer(x, scanned):
                index, choice, weight = scanned
                return x + op(x, gate_up, down, index, choice, weight), None

            return jnp.sum(jnp.sin(jax.lax.scan(layer, x, (jnp.arange(L), choice, weight))[0]))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(x, gate_up, down, weight)

    args = (0.3 * normal((9, D), 2), *weights(), normal(choice.shape, 3))
    assert_same(through(sparse, *args), through(dense, *args))


def test_experts_that_nobody_chose_are_not_read():
    """Their weights, and the other layer's, are NaN: 0 · NaN anywhere would show."""
    used, unused = jnp.array([0, 2, 3]), jnp.array([1, E - 1])
    choice = used[chosen(200, 3) % 3].at[7].set(-1)
    x, weight = normal((200, D), 2), normal((200, 3), 3)
    clean = weights()
    poisoned = [w.at[0].set(jnp.nan).at[1, unused].set(jnp.nan) for w in clean]
    args = (LAYER, choice, weight)
    np.testing.assert_array_equal(run(x, *map(Stack, poisoned), *args), run(x, *map(Stack, clean), *args))
    got, want = (gradients(sparse, x, *w, *args, x) for w in (poisoned, clean))
    assert_same(got, want)
    for gradient in got[1:3]:
        assert not np.any(gradient[0])
        assert not np.any(gradient[1, unused])
        assert np.all(np.any(gradient[1, used].reshape(3, -1), axis=1))


def test_a_token_that_is_nan_stays_alone():
    x = normal((200, D), 2).at[0].set(jnp.nan)  # token 0 also stands in for the padding of blocks
    y = run(x, *map(Stack, weights()), LAYER, chosen(200, 3), normal((200, 3), 3))
    assert np.all(np.isnan(y[0]))
    assert np.all(np.isfinite(y[1:]))


def test_the_gradient_holds_two_layers_beside_its_results_and_no_stack():
    layers, count, width, inner = 16, 8, 64, 64
    shapes = ((32, width), (layers, count, 2, inner, width), (layers, count, width, inner))
    x, gate_up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    choice, weight = (jax.ShapeDtypeStruct((32, 2), dtype) for dtype in (jnp.int32, jnp.float32))
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    memory = gradients.lower(sparse, x, gate_up, down, layer, choice, weight, x).compile().memory_analysis()
    one_layer = 3 * 4 * count * width * inner
    assert memory.temp_size_in_bytes < 2 * one_layer
