"""On a real GPU: Hugging Face's numbers on the path that the device gets, and kernels against their references."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import glmjax
from glmjax.pallas import dispatch
from glmjax.pallas.rms_norm import reference, rms_norm

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["sparse", "shared_indexer", "grouped", "dense", "fp8"])
def test_golden_logits(name):
    tensors = load_file(GOLDEN / name / "golden.safetensors")
    out = glmjax.load(GOLDEN / name, dtype="float32").forward(tensors["input_ids"])
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
