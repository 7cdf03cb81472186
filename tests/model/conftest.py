"""The golden checkpoints of Hugging Face's implementation, loaded once."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from glmjax.model import checkpoint
from glmjax.model.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
SETS = ("sparse", "shared_indexer", "grouped", "dense", "fp8")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One set: what Hugging Face (or its dequantised weights, for fp8) gave."""

    name: str
    path: Path
    model: Transformer
    tensors: dict[str, np.ndarray]

    @property
    def ids(self) -> jax.Array:
        return jnp.asarray(self.tensors["input_ids"].astype(np.int32))


@functools.cache
def golden(name: str) -> Golden:
    path = GOLDEN / name
    return Golden(name, path, checkpoint.load(path, dtype=jnp.float32), load_file(path / "golden.safetensors"))


@pytest.fixture(params=SETS)
def each(request) -> Golden:
    return golden(request.param)


@pytest.fixture(params=SETS[:-1])
def recorded(request) -> Golden:
    """The sets with every intermediate; the FP8 one has logits only."""
    return golden(request.param)


@pytest.fixture
def fp8() -> Golden:
    return golden("fp8")


@pytest.fixture
def sparse() -> Golden:
    return golden("sparse")


@pytest.fixture(params=("sparse", "shared_indexer"))
def drafting(request) -> Golden:
    """The sets with MTP results."""
    return golden(request.param)
