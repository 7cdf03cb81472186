"""The indexer learns where attention looks (DeepSeek-V3.2, section 2.1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from glmjax.model.transformer import LayerView, Transformer
from glmjax.pallas import selection
from glmjax.pallas.precision import einsum
from glmjax.pallas.select import index_scores
from glmjax.pallas.top_k import by_sorting, comparable

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Distilled(NamedTuple):
    """Of one layer, means over the queries that were looked at.

    Attributes:
        kl: KL(attention ‖ softmax of the index scores), nats, over what the layer's attention reads.
        recall: share of the dense attention's mass on the best k positions, over queries that see more; 1
            where none does.
    """

    kl: jax.Array
    recall: jax.Array


def distillation(model: Transformer, view: LayerView, queries: int, k: int) -> Distilled:
    """The loss of a layer's indexer at some of the queries of every row.

    Attention's distribution is the mean over heads of the softmax. While the model attends to everything visible
    (index_topk covers the row) that is the dense warm-up; where it attends to a selection, both distributions are
    confined to that. The target carries no gradient, nor do the indexer's inputs: the loss reaches the indexer's own
    weights and nothing else.

    Args:
        model: whose indexer.
        view: a layer with an indexer.
        queries: how many evenly spaced tokens of each row to look at.
        k: the selection's size; the layer attends densely where the model's own index_topk is larger.
    """
    config, index, length = model.config, view.index, view.normed_BTD.shape[1]
    chosen = jnp.linspace(0, length - 1, min(queries, length)).astype(jnp.int32)
    latent_BTQ, normed_BTD, rope, step = jax.tree.map(
        lambda x: x[:, chosen], lax.stop_gradient((view.latent_BTQ, view.normed_BTD, view.rope, view.step))
    )
    capacity = view.cache.capacity
    visible_BTS = selection.visible(step.first_BT, step.positions_BT, capacity)

    q_BTNC = model.attention.query(index.layer, latent_BTQ, rope)
    rows_BSC = view.cache.latents.of_sequences(0, None)
    scores_BTNS = einsum("BTNC,BSC->BTNS", q_BTNC, rows_BSC, out=jnp.float32) * config.softmax_scale
    attention_BTNS = jax.nn.softmax(jnp.where(visible_BTS[:, :, None], scores_BTNS, _LOWEST), axis=-1)
    dense_BTS = lax.stop_gradient(jnp.mean(attention_BTNS, axis=2))

    query = model.indexer.query(index.index_ordinal, latent_BTQ, normed_BTD, rope)
    index_BTS = index_scores(*query, view.cache.index_keys.of_sequences(0, None))

    best_BTS = visible_BTS
    if k < capacity:
        best_BTK = by_sorting(comparable(lax.stop_gradient(index_BTS), visible_BTS), k)
        best_BTS = selection.mask(best_BTK, capacity)
    read_BTS = best_BTS if config.index_topk == k else visible_BTS
    target_BTS = jnp.where(read_BTS, dense_BTS, 0.0)
    target_BTS = target_BTS / jnp.maximum(jnp.sum(target_BTS, axis=-1, keepdims=True), 1e-20)
    log_q_BTS = jax.nn.log_softmax(jnp.where(read_BTS, index_BTS, _LOWEST), axis=-1)
    log_p_BTS = jnp.log(jnp.maximum(target_BTS, 1e-20))
    kl_BT = jnp.sum(jnp.where(read_BTS, target_BTS * (log_p_BTS - log_q_BTS), 0.0), axis=-1)

    real_BT = jnp.any(visible_BTS, axis=-1)
    left_out_BT = jnp.sum(visible_BTS, axis=-1) > k
    recall = jnp.sum(jnp.sum(dense_BTS * best_BTS, axis=-1) * left_out_BT) / jnp.maximum(jnp.sum(left_out_BT), 1)
    kl = jnp.sum(kl_BT * real_BT) / jnp.maximum(jnp.sum(real_BT), 1)
    return Distilled(kl, jnp.where(jnp.any(left_out_BT), recall, 1.0))
