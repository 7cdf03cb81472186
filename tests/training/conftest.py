"""A model small enough to train in a test."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source
from glmjax.training.data import Tokens

TINY = GlmConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    mlp_layer_types=("dense", "sparse"),
    indexer_types=("full", "shared"),
    index_topk=8,
    index_n_heads=4,
    index_head_dim=16,
    max_position_embeddings=64,
    num_nextn_predict_layers=1,
)


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
