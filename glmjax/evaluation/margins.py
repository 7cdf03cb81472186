"""How near a token was to being another one: what rounding may decide, and what it may not.

Programs of different shapes add in different orders, so their last bits differ. Where a choice is that close, they may
choose differently: a token, the rows that attention reads, the experts. What sampling parameters leave out (top-p and the
like) is as far away as can be, however nearly it was kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from glmjax.glm import GLM
from glmjax.model.cache import ContiguousCache
from glmjax.model.sampling import noisy
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.model.transformer import LayerView, Transformer
from glmjax.pallas.blocks import map_query_blocks
from glmjax.pallas.rms_norm import rms_norm
from glmjax.pallas.select import index_scores
from glmjax.pallas.selection import visible
from glmjax.pallas.top_k import comparable

_LENGTHS = 256  # of which those are multiples that a program is compiled for
_BLOCK_BYTES = 64 << 20  # of index scores that exist at once


class Margins(NamedTuple):
    """Of one token. All float32, inf where there is nothing to choose.

    Attributes:
        token: by how much it was ahead of the second best, processed logits and noise together.
        selection: by how much the last row that attention read was ahead of the first that it did not, index scores;
            the least over layers with an indexer. Where both scores are 0, no head looks at either and the earlier row
            is read, by rule: nothing that rounding decides.
        router: the same of experts, biased router scores; the least over sparse layers.
        earlier: the least of `selection` and `router` of the tokens before, whose rows the token was made from.
        earlier_position: of the token where that is.
    """

    token: float
    selection: float
    router: float
    earlier: float
    earlier_position: int

    @property
    def least(self) -> float:
        """Of what decided this token: `earlier` is not in it, for in a long text something is always close."""
        return min(self.token, self.selection, self.router)


def margins(glm: GLM, prompt: Sequence[int], params: SamplingParams, emitted: Sequence[int]) -> Margins:
    """How near the token after the emitted ones was to being another, by one forward over all that comes before it.

    Args:
        glm: the model.
        prompt: token ids.
        params: how the sequence is sampled; with a seed where it needs one.
        emitted: the tokens before the one in question.

    Raises:
        ValueError: there is no prompt, or the parameters are not valid.
    """
    if not len(prompt):
        raise ValueError("the prompt has no tokens; give at least one")
    ids, vocab = [*prompt, *emitted], glm.config.vocab_size
    tokens = glm.tokenizer.vocab_size if glm.tokenizer else None
    state = SamplingState.from_params([params], [prompt], vocab, tokens)
    counts_V = np.bincount(np.asarray(emitted, np.int64), minlength=vocab).astype(np.int32)
    state = dataclasses.replace(state, counts_BV=jnp.asarray(counts_V[None]))
    ids_BT = np.zeros((1, -(-len(ids) // _LENGTHS) * _LENGTHS), np.int32)
    ids_BT[0, : len(ids)] = ids

    scores_V, selection_T, router_T = jax.tree.map(
        np.asarray, _scored(glm.weights, ids_BT, np.int32(len(ids)), state, dtype=glm.kv_cache_dtype)
    )
    last = len(ids) - 1
    either_T = np.minimum(selection_T, router_T)[:last]
    return Margins(
        token=float(ahead(jnp.asarray(scores_V), 1)),
        selection=float(selection_T[last]),
        router=float(router_T[last]),
        earlier=float(either_T.min(initial=np.inf)),
        earlier_position=int(either_T.argmin()) if last else 0,
    )


def ahead(scores: Float[Array, "*rows S"], k: int, *, settled: float = -jnp.inf) -> Float[Array, "*rows"]:
    """By how much the k-th best is ahead of the next: 0 where they tie, inf where nothing is chosen between.

    Args:
        scores: float32.
        k: how many are chosen.
        settled: the score of what is chosen by rule only: where k-th best and next both have it, or the next is −inf,
            the result is inf.
    """
    if k >= scores.shape[-1]:
        return jnp.full(scores.shape[:-1], jnp.inf)
    best = lax.top_k(scores, k + 1)[0]
    last, following = best[..., k - 1], best[..., k]
    by_rule = (following == -jnp.inf) | ((last == settled) & (following == settled))
    return jnp.where(by_rule, jnp.inf, last - following)


@functools.partial(jax.jit, static_argnames="dtype")
def _scored(
    model: Transformer, ids_BT: Int[Array, "B T"], length: Int[Array, ""], state: SamplingState, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the next token is the largest of [V], and every token's selection and router margins [T]."""

    def look(view: LayerView) -> tuple[jax.Array, jax.Array]:
        return _selection(model, view), _router(model, view)

    cache = ContiguousCache.create(model.config, *ids_BT.shape, dtype, model_dtype=model.dtype)
    offset_T = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
    step = cache.step(jnp.where(offset_T < length, offset_T, -1)[None])
    out = model.backbone(ids_BT, cache, step, observe=look)
    hidden_BD = lax.dynamic_index_in_dim(out.hidden_BTD, length - 1, axis=1, keepdims=False)
    scores_BV = noisy(model.head(hidden_BD[:, None])[:, 0], state, length[None])
    selection_T, router_T = (functools.reduce(jnp.minimum, margins)[0] for margins in zip(*out.observed, strict=True))
    return scores_BV[0], selection_T, router_T


def _selection(model: Transformer, view: LayerView) -> jax.Array:
    """[B, T]."""
    config, step, ordinal = model.config, view.step, view.index.index_ordinal
    if view.index.indexer != "full":
        return jnp.full(step.positions_BT.shape, jnp.inf)
    keys_BSJ = view.cache.index_keys.of_sequences(ordinal, step.pages_BM)
    query = model.indexer.query(ordinal, view.latent_BTQ, view.normed_BTD, view.rope)

    def block(*query: jax.Array) -> jax.Array:
        *query, first_BT, last_BT = query
        scores_BTS = index_scores(*query, keys_BSJ)
        visible_BTS = visible(first_BT, last_BT, keys_BSJ.shape[1])
        return ahead(comparable(scores_BTS, visible_BTS), config.index_topk, settled=0.0)

    per_query = 4 * keys_BSJ.shape[0] * keys_BSJ.shape[1] * (config.index_n_heads + 4)
    return map_query_blocks(block, per_query, *query, step.first_BT, step.positions_BT, budget=_BLOCK_BYTES)


def _router(model: Transformer, view: LayerView) -> jax.Array:
    """[B, T]."""
    if view.index.mlp == "dense":
        return jnp.full(view.step.positions_BT.shape, jnp.inf)
    before_BTD = view.hidden_BTD - view.mlp_BTD
    norm_LD, eps = model.post_attention_norm_LD.array, model.config.rms_norm_eps
    scores_BTE = model.experts.scores(view.index.mlp_ordinal, rms_norm(before_BTD, norm_LD, view.index.layer, eps=eps))
    return ahead(scores_BTE, model.config.num_experts_per_tok)
