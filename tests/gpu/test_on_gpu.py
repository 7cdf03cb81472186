"""On a real GPU: Hugging Face's numbers with the references in XLA, and kernels against their references."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import glmjax
from glmjax.pallas import dispatch, gather
from glmjax.pallas.rms_norm import reference, rms_norm
from glmjax.pallas.rows import Rows

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["sparse", "shared_indexer", "grouped", "dense", "fp8"])
def test_golden_logits(name, record_property):
    tensors = load_file(GOLDEN / name / "golden.safetensors")
    with dispatch.implementation("reference"):
        out = glmjax.load(GOLDEN / name, dtype="float32").forward(tensors["input_ids"])
    record_property("device", out.logits_BTV.device.device_kind)
    record_property("largest_error", float(np.max(np.abs(out.logits_BTV - tensors["logits"]))))
    np.testing.assert_allclose(out.logits_BTV, tensors["logits"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [1, 17, 512])
def test_rms_norm_kernel(rows, dtype):
    x = jax.random.normal(jax.random.key(0), (rows, 6144), dtype)
    weights = jax.random.normal(jax.random.key(1), (3, 6144), dtype)
    with dispatch.implementation("mosaic"):
        found = jax.jit(lambda x, w: rms_norm(x, w, 1, eps=1e-5))(x, weights)
    wanted = reference(x, weights, 1, eps=1e-5)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=tolerance, atol=1e-6)


def gathered(rows, layer, slot_K):
    from glmjax.pallas import gather_mosaic

    assert gather_mosaic.supports(rows, layer, slot_K)
    return np.asarray(jax.jit(gather_mosaic.mosaic)(rows, layer, slot_K), np.float32)


def indexed(rows, layer, slot_K):
    return np.asarray(gather.reference(rows, layer, slot_K), np.float32)


@pytest.mark.parametrize("width", [64, 128, 576])
def test_gather_kernel_through_swizzled_shared_memory(width):
    rows = Rows(jax.random.normal(jax.random.key(0), (3, 64, 64, width), jnp.bfloat16))
    for layer in range(3):
        slot_K = jax.random.randint(jax.random.key(layer), (2048,), -1, 64 * 64, jnp.int32)
        np.testing.assert_array_equal(gathered(rows, layer, slot_K), indexed(rows, layer, slot_K))


def test_gather_kernel_reads_nothing_but_what_slots_name():
    rows = Rows(jnp.full((1, 2, 64, 576), jnp.nan, jnp.bfloat16).at[0, 1, 63].set(1))
    found = gathered(rows, 0, jnp.asarray([127, -1] * 32, jnp.int32))
    np.testing.assert_array_equal(found, np.tile([[1.0], [0.0]], (32, 576)))


def test_gather_kernel_beyond_four_gibibytes():
    number_SC = jax.lax.broadcasted_iota(jnp.int32, (2 * 32768 * 64, 576), 0) % 251  # exact in bfloat16
    rows = Rows(number_SC.astype(jnp.bfloat16).reshape(2, 32768, 64, 576))
    slot_K = jnp.arange(32768 * 64 - 128, 32768 * 64, dtype=jnp.int32)
    wanted = (32768 * 64 + np.asarray(slot_K)) % 251
    np.testing.assert_array_equal(gathered(rows, 1, slot_K), np.tile(wanted[:, None], (1, 576)))
