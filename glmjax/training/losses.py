"""What training minimises: next token, the MTP layer's tokens after it, and the indexer's distillation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmjax.model.cache import previous_hidden, whole_sequences
from glmjax.model.transformer import LayerView, Observer, Transformer
from glmjax.training.distillation import Distilled, distillation


class Losses(NamedTuple):
    """Means over tokens, in nats, and how the routers spread them.

    Attributes:
        next_token: cross-entropy of token t + 1 from the main model.
        mtp_K: cross-entropy of the MTP layer at its first, second, … application: token t + 1 + k.
        indexer: KL divergence of the indexers' distribution from attention's, mean over layers.
        recall: share of attention that lies on what the indexers select, where they leave something out.
        load_LE: share of choices that went to each expert, a row per sparse layer, the MTP layer's last where it was
            applied.
    """

    next_token: jax.Array
    mtp_K: jax.Array
    indexer: jax.Array
    recall: jax.Array
    load_LE: jax.Array


class Batch(NamedTuple):
    """Packed rows of T + 1 tokens.

    Attributes:
        ids_BT: tokens.
        start_BT: where in the row each token's document begins.
        scored_BT: which tokens are targets.
    """

    ids_BT: jax.Array
    start_BT: jax.Array
    scored_BT: jax.Array


def losses(
    model: Transformer,
    batch: Batch,
    *,
    mtp_steps: int = 1,
    mtp_rows: int | None = None,
    distilled: int,
    index_topk: int | None = None,
    remat: bool = False,
) -> Losses:
    """All of them on a batch of packed rows.

    Args:
        model: with its MTP layer.
        batch: rows.
        mtp_steps: how often the MTP layer is applied, each time to its own output; every application is trained.
            0: none.
        mtp_rows: rows that applications after the first see (they cost a layer and a head each); default all.
        distilled: how many queries of each row the indexer learns from.
        index_topk: the selection's size where the model attends to more than that; default the model's own.
        remat: see `Transformer.backbone`.
    """
    ids_BT, start_BT, target_BT = batch.ids_BT[:, :-1], batch.start_BT[:, :-1], batch.ids_BT[:, 1:]
    scored_BT = batch.scored_BT[:, 1:]
    cache, step = whole_sequences(model.config, ids_BT, model.dtype, start_BT)
    observe = _observer(model, distilled, index_topk or model.config.index_topk)

    main = model.backbone(ids_BT, cache, step, observe=observe, remat=remat)
    next_token = mean_cross_entropy(model, main.hidden_BTD, target_BT, scored_BT)
    mtp, observed, hidden_BTD = [], [], main.hidden_BTD
    for k in range(1, mtp_steps + 1):
        if k == 2 and mtp_rows is not None:
            ids_BT, start_BT, target_BT, scored_BT, hidden_BTD = (
                x[:mtp_rows] for x in (ids_BT, start_BT, target_BT, scored_BT, hidden_BTD)
            )
            cache, step = whole_sequences(model.config, ids_BT, model.dtype, start_BT)
        previous_BTD = previous_hidden(hidden_BTD, cache.tail_BD)
        draft = model.draft(ids_BT, previous_BTD, cache, step, observe=observe if k == 1 else None)
        observed += draft.observed
        hidden_BTD = draft.hidden_BTD
        drafted_BT = step.positions_BT - start_BT >= k  # the k-th application needs k hidden states before the token
        mtp.append(mean_cross_entropy(model, hidden_BTD, target_BT, scored_BT & drafted_BT))
    seen = [*main.observed, *observed]
    kept = [of for of, _ in seen if of is not None]
    return Losses(
        next_token,
        jnp.stack(mtp) if mtp else jnp.zeros(0),
        jnp.mean(jnp.stack([of.kl for of in kept])),
        jnp.mean(jnp.stack([of.recall for of in kept])),
        jnp.stack([load for _, load in seen if load is not None]),
    )


def mean_cross_entropy(
    model: Transformer, hidden_BTD: jax.Array, target_BT: jax.Array, scored_BT: jax.Array
) -> jax.Array:
    """−log p of the scored targets from hidden states after the final norm, nats; 0 where none is scored."""
    nll_BT = cross_entropy(model.head(hidden_BTD), target_BT) * scored_BT
    return jnp.sum(nll_BT) / jnp.maximum(jnp.sum(scored_BT), 1)


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
    """−log p of each target, nats."""
    picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def _observer(model: Transformer, distilled: int, k: int) -> Observer:
    def observe(view: LayerView) -> tuple[Distilled | None, jax.Array | None]:
        kept = distillation(model, view, distilled, k) if view.index.indexer == "full" else None
        if view.choice_BTX is None:
            return kept, None
        load_E = jnp.zeros(model.config.n_routed_experts).at[view.choice_BTX.reshape(-1)].add(1.0)
        return kept, load_E / view.choice_BTX.size

    return observe
