"""What training minimises: next token, the MTP layer's token after it, and the indexer's distillation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmjax.model.cache import previous_hidden, whole_sequences
from glmjax.model.transformer import LayerView, Observer, Transformer
from glmjax.pallas.precision import einsum
from glmjax.pallas.select import index_scores


class Losses(NamedTuple):
    """Means over tokens, in nats, and how the routers spread them.

    Attributes:
        next_token: cross-entropy of token t + 1 from the main model.
        mtp: cross-entropy of token t + 2 from the MTP layer.
        indexer: KL divergence of the indexers' distribution from attention's, mean over layers.
        load_LE: share of choices that went to each expert, a row per sparse layer, the MTP layer's last.
    """

    next_token: jax.Array
    mtp: jax.Array
    indexer: jax.Array
    load_LE: jax.Array


def losses(
    model: Transformer, ids_BT: jax.Array, start_BT: jax.Array, *, distilled: int, remat: bool = False
) -> Losses:
    """All of them on a batch of packed rows.

    Args:
        model: with its MTP layer.
        ids_BT: tokens, one more than predictions.
        start_BT: where in the row each token's document begins.
        distilled: how many of the rows the indexer learns from (its target costs a second pass of attention).
        remat: see `Transformer.backbone`.
    """
    target_BT, ids_BT, start_BT = ids_BT[:, 1:], ids_BT[:, :-1], start_BT[:, :-1]
    cache, step = whole_sequences(model.config, ids_BT, model.dtype, start_BT)
    observe = _observer(model, distilled)

    main = model.backbone(ids_BT, cache, step, observe=observe, remat=remat)
    next_token = jnp.mean(cross_entropy(model.head(main.hidden_BTD), target_BT))
    previous_BTD = previous_hidden(main.hidden_BTD, cache.tail_BD)
    draft = model.draft(ids_BT, previous_BTD, cache, step, observe=observe)
    drafted_BT = (step.positions_BT > start_BT).astype(jnp.float32)  # a document's first row has no hidden before it
    mtp_BT = cross_entropy(model.head(draft.hidden_BTD), target_BT) * drafted_BT
    seen = [*main.observed, *draft.observed]
    return Losses(
        next_token,
        jnp.sum(mtp_BT) / jnp.maximum(jnp.sum(drafted_BT), 1),
        jnp.mean(jnp.stack([kl for kl, _ in seen if kl is not None])),
        jnp.stack([load for _, load in seen if load is not None]),
    )


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
    """−log p of each target, nats."""
    picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def _observer(model: Transformer, distilled: int) -> Observer:
    def observe(view: LayerView) -> tuple[jax.Array | None, jax.Array | None]:
        kl = distillation(model, view, distilled) if view.index.indexer == "full" else None
        if view.choice_BTX is None:
            return kl, None
        load_E = jnp.zeros(model.config.n_routed_experts).at[view.choice_BTX.reshape(-1)].add(1.0)
        return kl, load_E / view.choice_BTX.size

    return observe


def distillation(model: Transformer, view: LayerView, rows: int) -> jax.Array:
    """KL(attention ‖ softmax of the index scores) over everything visible, as DeepSeek-V3.2 warms its indexer up.

    Attention's distribution is the mean over heads of the dense softmax. It carries no gradient, nor do the indexer's
    inputs: the loss reaches the indexer's own weights and nothing else.

    Args:
        model: whose indexer.
        view: a layer with an indexer.
        rows: how many rows of the batch to look at.
    """
    config, index = model.config, view.index
    latent_BTQ, normed_BTD, rope, step = jax.tree.map(
        lambda x: x[:rows], (view.latent_BTQ, view.normed_BTD, view.rope, view.step)
    )
    position_S = jnp.arange(view.cache.capacity, dtype=jnp.int32)
    last_BT1, first_BT1 = step.positions_BT[..., None], step.first_BT[..., None]
    visible_BTS = (position_S >= first_BT1) & (position_S <= last_BT1)
    lowest = jnp.finfo(jnp.float32).min

    q_BTNC = model.attention.query(index.layer, latent_BTQ, rope)
    rows_BSC = view.cache.latents.of_sequences(0, None)[:rows]
    scores_BTNS = einsum("BTNC,BSC->BTNS", q_BTNC, rows_BSC, out=jnp.float32) * config.softmax_scale
    attention_BTNS = jax.nn.softmax(jnp.where(visible_BTS[:, :, None], scores_BTNS, lowest), axis=-1)
    target_BTS = jax.lax.stop_gradient(jnp.mean(attention_BTNS, axis=2))

    query = model.indexer.query(index.index_ordinal, latent_BTQ, normed_BTD, rope)
    keys_BSJ = view.cache.index_keys.of_sequences(0, None)[:rows]
    log_q_BTS = jax.nn.log_softmax(jnp.where(visible_BTS, index_scores(*query, keys_BSJ), lowest), axis=-1)
    log_p_BTS = jnp.log(jnp.maximum(target_BTS, 1e-20))
    kl_BT = jnp.sum(jnp.where(visible_BTS, target_BTS * (log_p_BTS - log_q_BTS), 0.0), axis=-1)
    return jnp.mean(jnp.where(jnp.any(visible_BTS, axis=-1), kl_BT, 0.0))
