"""Continuing prompts by speculative decoding, all at once, with a record of what each round emitted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32

from glmjax.glm import GLM
from glmjax.model.cache import ContiguousCache
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.model.transformer import Transformer
from glmjax.speculation import DecodeState, begin, prefill, speculate


class Continued(NamedTuple):
    """One sequence that was generated.

    Attributes:
        ids: its new tokens; a stop token is the last.
        counts: tokens of each round, the first token aside.
    """

    ids: list[int]
    counts: list[int]


def continued(
    glm: GLM, prompts: Sequence[np.ndarray], params: SamplingParams, new_tokens: int, num_draft: int
) -> list[Continued]:
    """Continue prompts by speculative decoding, all at once.

    Args:
        glm: the model, with its MTP layer.
        prompts: tokens of each, equally many, which leave room in the context for the new ones and drafts.
        params: how to sample; with a seed where it needs one, the other sequences take those after it.
        new_tokens: of each sequence, and up to `num_draft` more.
        num_draft: drafts a round.
    """
    vocab = glm.config.vocab_size
    each = [
        params if params.seed is None else dataclasses.replace(params, seed=params.seed + b)
        for b in range(len(prompts))
    ]
    sampling = SamplingState.from_params(each, prompts, vocab, glm.tokenizer.vocab_size)
    stops_V = np.isin(np.arange(vocab), list(glm.stops.token_ids))

    ids_BT = np.stack(prompts)
    state = _start(glm.weights, ids_BT, sampling, rows=ids_BT.shape[1] + new_tokens + num_draft)
    tokens_BS, counts_BS = _rollout(glm.weights, state, stops_V, new_tokens=new_tokens, num_draft=num_draft)
    out = []
    for tokens, counts in zip(np.asarray(tokens_BS), np.asarray(counts_BS), strict=True):
        rounds = counts[counts > 0].tolist()
        ids = tokens[: 1 + sum(rounds)]
        stopped = np.flatnonzero(stops_V[ids])[:1]
        out.append(Continued(ids[: stopped[0] + 1].tolist() if len(stopped) else ids.tolist(), rounds))
    return out


@functools.partial(jax.jit, static_argnames="rows")
def _start(model: Transformer, ids_BT: Int[Array, "B T"], sampling: SamplingState, rows: int) -> DecodeState:
    batch, length = ids_BT.shape
    cache = ContiguousCache.create(model.config, batch, rows, model.dtype, mtp=True)
    step = cache.step(jnp.broadcast_to(jnp.arange(length), (batch, length)))
    hidden_BTD, cache = prefill(model, cache, cache.tail_BD, ids_BT, step)
    return begin(model, cache, hidden_BTD[:, -1], jnp.full(batch, length), sampling)


@functools.partial(jax.jit, static_argnames=("new_tokens", "num_draft"))
def _rollout(
    model: Transformer, state: DecodeState, stops_V: Bool[Array, "V"], new_tokens: int, num_draft: int
) -> tuple[Int32[Array, "B S"], Int32[Array, "B R"]]:
    """Rounds until every sequence has stopped or has its tokens: what they emitted, and how many in each round."""
    slots_B1 = jnp.arange(state.token_B.shape[0])[:, None]
    tokens_BS = jnp.full((len(slots_B1), new_tokens + num_draft), -1, jnp.int32).at[:, 0].set(state.token_B)
    counts_BR = jnp.zeros((len(slots_B1), new_tokens), jnp.int32)

    def ended(state: DecodeState, tokens_BT: jax.Array, written_B: jax.Array) -> DecodeState:
        stopped_B = jnp.any(stops_V[tokens_BT] & (tokens_BT >= 0), axis=1)
        done_B = stopped_B | (written_B >= new_tokens)
        return dataclasses.replace(state, position_B=jnp.where(done_B, -1, state.position_B))

    def advance(carry: Any) -> Any:
        n, state, written_B, tokens_BS, counts_BR = carry
        out = speculate(model, state, num_draft=num_draft)
        place_BT = written_B[:, None] + jnp.arange(num_draft + 1)
        place_BT = jnp.where(out.tokens_BT >= 0, place_BT, tokens_BS.shape[1])
        tokens_BS = tokens_BS.at[slots_B1, place_BT].set(out.tokens_BT, mode="drop")
        written_B = written_B + out.count_B
        state = ended(out.state, out.tokens_BT, written_B)
        return n + 1, state, written_B, tokens_BS, counts_BR.at[:, n].set(out.count_B)

    written_B = jnp.ones_like(state.token_B)
    state = ended(state, state.token_B[:, None], written_B)
    carry = (jnp.int32(0), state, written_B, tokens_BS, counts_BR)
    *_, tokens_BS, counts_BR = lax.while_loop(lambda carry: jnp.any(carry[1].position_B >= 0), advance, carry)
    return tokens_BS, counts_BR
