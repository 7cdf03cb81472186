"""Weights and cached rows out of a generator, for benchmarks to which no checkpoint matters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.model.assemble import abstract, named_weights
from glmjax.model.cache import ContiguousCache
from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.pallas.rows import Rows


def random_model(config: GlmConfig, dtype: Any) -> Transformer:
    """Without the MTP layer, with normal weights, norms of one. The experts of a layer may repeat each other's numbers."""

    def draw(seed: int, shape: tuple[int, ...], columns: int, dtype: Any) -> jax.Array:
        if not columns:
            return jnp.ones(shape, dtype)
        fan_in = jnp.prod(jnp.asarray(shape[-columns:], jnp.float32)).astype(dtype)
        normal = jax.random.normal(jax.random.key(seed, impl="rbg"), shape[-3:], dtype)
        return jnp.broadcast_to(normal * fan_in**-0.5, shape)

    model = abstract(config, dtype, mtp=False, fp8=False)
    drawn = jax.jit(draw, static_argnums=(1, 2, 3))
    for seed, weight in enumerate(named_weights(model).values()):
        weight.values.set_value(drawn(seed, weight.array.shape, weight.columns, weight.array.dtype))
    return model


def random_cache(config: GlmConfig, capacity: int, dtype: Any) -> ContiguousCache:
    """One sequence's, full of normal rows."""

    def filled(rows: Rows) -> Rows:
        return Rows(jax.random.normal(jax.random.key(capacity), rows.values_LGAC.shape, dtype))

    cache = ContiguousCache.create(config, 1, capacity, dtype)
    return dataclasses.replace(cache, latents=filled(cache.latents), index_keys=filled(cache.index_keys))
