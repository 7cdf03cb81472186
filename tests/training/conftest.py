"""A model small enough to train in a test."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source
from glmjax.training.data import Tokens

TINY = GlmConfig.from_dir(Path(__file__).parents[1] / "tiny.json")


@pytest.fixture
def tiny_config() -> GlmConfig:
    return TINY


@functools.cache
def _model() -> Transformer:
    return Transformer(TINY, dtype=jnp.float32, rngs=random_source(0))


@pytest.fixture
def tiny_model() -> Transformer:
    return _model()


@pytest.fixture
def counting_tokens() -> Tokens:
    """Documents that count upwards modulo 60: learnable at once. The end token is 63."""
    rng = np.random.default_rng(0)
    documents = [
        np.append((np.arange(rng.integers(20, 60)) + rng.integers(60)) % 60, 63).astype(np.int32) for _ in range(64)
    ]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return Tokens(np.concatenate(documents), offsets, 63)
