"""Speculative decoding without loss: the MTP layer drafts tokens, one forward of the target verifies them all.

A round begins with the newest token x at position n, which has no rows yet, and the hidden state of n − 1:

  draft   the MTP layer, applied `num_draft` times, writes rows n, n + 1, … and guesses the tokens after each: the first
          time from x and the target's hidden state, then from its own guess and its own output
  verify  the target reads x and all drafts at once and draws the token after each of them; drafts are accepted while
          they equal what is drawn, and the token drawn after the last accepted one comes for free
  commit  MTP rows of accepted positions are written again, from the target's hidden states: those that drafting wrote
          were provisional. Rows of rejected drafts stay, invisible, until they are overwritten

Draft and target add the same Gumbel noise at the same position (`glmjax.model.sampling`), and the emitted token is always
the target's. So output depends neither on whether nor on how far one speculates, sampled or greedy, and a draft is
accepted as often as both would draw the same token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from glmjax.model.cache import Cache, Step, last_token, previous_hidden
from glmjax.model.sampling import observe, sample
from glmjax.model.sampling_params import SamplingState
from glmjax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """B sequences between two rounds.

    Attributes:
        cache: rows of every token before the newest, the MTP layer's too. Any `Cache`; where it has tails of its own,
            they are its owner's to keep (`Round.hidden_BTD`).
        tail_BD: hidden state after the final norm of the last token that has rows.
        token_B: int32, the newest token, which has none.
        position_B: int32, its position; −1 where a slot is idle or finished: a round leaves all of it as it is.
        sampling: how each sequence is sampled, and counts of what it has emitted, the newest token included.
    """

    cache: Any
    tail_BD: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    sampling: SamplingState


class Round(NamedTuple):
    """What a round comes back with; T = num_draft + 1. What is not used of it costs nothing under `jax.jit`.

    Attributes:
        state: for the next round.
        tokens_BT: int32, the emitted tokens, −1 after them; the first one's position is the old position_B + 1.
        count_B: int32, how many: the accepted drafts and one more, 0 for an idle slot.
        hidden_BTD: the target's hidden states at the old position_B + t, right where t < count_B.
        logits_BTV: the target's logits there, of which tokens_BT were drawn.
    """

    state: DecodeState
    tokens_BT: Int32[Array, "B T"]
    count_B: Int32[Array, "B"]
    hidden_BTD: Float[Array, "B T D"]
    logits_BTV: Float[Array, "B T V"]


def prefill(
    model: Transformer, cache: Cache, tail_BD: Float[Array, "B D"], ids_BT: Int[Array, "B T"], step: Step
) -> tuple[Float[Array, "B D"], Cache]:
    """A chunk of prompt tokens: the new tail, and the cache with the chunk's rows, the MTP layer's too.

    Args:
        model: the network.
        cache: with rows of the tokens before the chunk.
        tail_BD: hidden state of the last of those; anything before the first chunk.
        ids_BT: tokens; anything where `step` says padding.
        step: of the tokens.
    """
    out = model.backbone(ids_BT, cache, step)
    cache = _with_mtp_rows(model, out.cache, ids_BT, out.hidden_BTD, tail_BD, step)
    return last_token(step, out.hidden_BTD, tail_BD), cache


def begin(
    model: Transformer,
    cache: Cache,
    tail_BD: Float[Array, "B D"],
    position_B: Int[Array, "B"],
    sampling: SamplingState,
) -> DecodeState:
    """The state after prompts: draws each sequence's first token.

    Args:
        model: the network.
        cache: with the prompts' rows.
        tail_BD: hidden state of each prompt's last token.
        position_B: of the first token to come, the prompt's length; −1 for an idle slot.
        sampling: of sequences that have emitted nothing yet.
    """
    token_B = sample(model.head(tail_BD[:, None].astype(model.dtype))[:, 0], sampling, position_B)
    active_B = position_B >= 0
    token_B = jnp.where(active_B, token_B, 0)
    return DecodeState(cache, tail_BD, token_B, position_B.astype(jnp.int32), observe(sampling, token_B, active_B))


def speculate(model: Transformer, state: DecodeState, *, num_draft: int) -> Round:
    """One round of draft and verification.

    Every shape follows from `state` and `num_draft`, and the state keeps its own: it can be the body of a
    `lax.while_loop`. A caller ends a sequence (a stop token, a limit, an abort) by setting its position to −1.

    Args:
        model: the network, with its MTP layer unless `num_draft` is 0.
        state: of the sequences. Rows that would lie beyond the cache are dropped: tokens are right up to position
            ``cache.capacity``, and a caller must cut what comes after.
        num_draft: how many tokens to draft; 0 is plain decoding, which still writes the MTP layer's rows.

    Raises:
        ValueError: drafts are asked of a model without an MTP layer.
    """
    chain_BT, cache = _draft(model, state, num_draft)
    step = cache.step(_positions(state.position_B, num_draft + 1))
    with jax.named_scope("verify"):
        out = model.backbone(chain_BT, cache, step)
        logits_BTV = model.head(out.hidden_BTD)
        tokens_BT, count_B, sampling = _accept(logits_BTV, chain_BT, state)

    kept_BT = jnp.arange(num_draft + 1) < count_B[:, None]
    kept = out.cache.step(jnp.where(kept_BT, step.positions_BT, -1))
    cache = _with_mtp_rows(model, out.cache, chain_BT, out.hidden_BTD, state.tail_BD, kept)
    active_B = count_B > 0
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    newest_B = jnp.take_along_axis(tokens_BT, last_B1, axis=1)[:, 0]
    after = DecodeState(
        cache=cache,
        tail_BD=last_token(kept, out.hidden_BTD, state.tail_BD),
        token_B=jnp.where(active_B, newest_B, state.token_B),
        position_B=state.position_B + count_B,
        sampling=sampling,
    )
    return Round(after, tokens_BT, count_B, out.hidden_BTD, logits_BTV)


def _draft(model: Transformer, state: DecodeState, num_draft: int) -> tuple[jax.Array, Cache]:
    """The newest token and the drafts after it [B, T], and the cache with the provisional MTP rows."""
    cache, sampling, selected = state.cache, state.sampling, None
    token_B, hidden_BTD = state.token_B, state.tail_BD[:, None].astype(model.dtype)
    chain = [token_B]
    for n in range(num_draft):
        step = cache.step(_positions(state.position_B, 1, n))
        out = model.draft(token_B[:, None], hidden_BTD, cache, step, selected=selected)
        cache, hidden_BTD = out.cache, out.hidden_BTD
        if model.config.index_share_for_mtp_iteration:
            selected = out.selected
        token_B = sample(model.head(hidden_BTD)[:, 0], sampling, state.position_B + n + 1)
        sampling = observe(sampling, token_B, state.position_B >= 0)  # penalties count the drafts before
        chain.append(token_B)
    return jnp.stack(chain, axis=1), cache


def _accept(
    logits_BTV: jax.Array, chain_BT: jax.Array, state: DecodeState
) -> tuple[jax.Array, jax.Array, SamplingState]:
    """The target's tokens after each of the chain, as long as they lead along it; how many; and with them counted."""
    length = chain_BT.shape[1]
    draft_BT = jnp.pad(chain_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)

    def draw(carry: tuple[SamplingState, jax.Array], t: jax.Array) -> tuple[tuple[SamplingState, jax.Array], jax.Array]:
        sampling, emits_B = carry
        token_B = sample(logits_BTV[:, t], sampling, state.position_B + t + 1)
        sampling = observe(sampling, token_B, emits_B)
        return (sampling, emits_B & (token_B == draft_BT[:, t])), jnp.where(emits_B, token_B, -1)

    (sampling, _), tokens_TB = lax.scan(draw, (state.sampling, state.position_B >= 0), jnp.arange(length))
    return tokens_TB.T, jnp.sum(tokens_TB >= 0, axis=0, dtype=jnp.int32), sampling


def _with_mtp_rows(
    model: Transformer, cache: Cache, ids_BT: jax.Array, hidden_BTD: jax.Array, tail_BD: jax.Array, step: Step
) -> Cache:
    """With the MTP layer's rows of tokens that the target has read. Nothing of the layer but its rows is computed."""
    if model.mtp is None:
        return cache
    return model.draft(ids_BT, previous_hidden(hidden_BTD, tail_BD), cache, step).cache


def _positions(position_B: jax.Array, length: int, begin: int = 0) -> jax.Array:
    """Of `length` tokens each, `begin` tokens after a given one; −1 for idle slots."""
    position_BT = position_B[:, None] + jnp.arange(begin, begin + length, dtype=jnp.int32)
    return jnp.where(position_B[:, None] >= 0, position_BT, -1)
