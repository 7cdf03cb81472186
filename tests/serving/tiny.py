"""A tiny network of the full kind, whose drafts are often right, and an engine of its size."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp

from glmjax.glm import GLM
from glmjax.model.config import GlmConfig
from glmjax.model.stops import Stops
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source
from glmjax.serving.config import EngineConfig

CONFIG = dataclasses.replace(GlmConfig.from_dir(Path(__file__).parents[1] / "tiny.json"), vocab_size=16)
ENGINE = EngineConfig(
    max_model_len=64, max_num_seqs=2, page_size=8, pages=18, chunk_tokens=16, max_rounds=6, adapts_draft=False
)
OFFLOADING = dataclasses.replace(ENGINE, offload_bytes=1 << 24)


@functools.cache
def tiny(vocab: int = CONFIG.vocab_size, index_topk: int = CONFIG.index_topk) -> GLM:
    """Random weights whose MTP layer goes by the token alone, as the target nearly does: some greedy drafts are right."""
    config = dataclasses.replace(CONFIG, vocab_size=vocab, index_topk=index_topk)
    model = Transformer(config, dtype=jnp.float32, rngs=random_source(0))
    width = CONFIG.hidden_size
    model.mtp.projection_D2D.values.set_value(jnp.stack([jnp.eye(width), jnp.zeros((width, width))], axis=1))
    return GLM(model, None, None, Stops())
