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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from glmjax.model.cache import Cache, Step, last_token, previous_hidden
from glmjax.model.sampling import allow, noisy, observe, sample
from glmjax.model.sampling_state import SamplingState
from glmjax.model.transformer import Hidden


@runtime_checkable
class Network(Protocol):
    """What is asked of a model: `glmjax.model.transformer.Transformer`, or what stands in for one.

    Attributes:
        config: with `index_share_for_mtp_iteration`.
        dtype: of hidden states.
        mtp: the MTP layer, or None.
    """

    config: Any
    dtype: Any
    mtp: Any

    def backbone(self, ids_BT: jax.Array, cache: Cache, step: Step) -> Hidden:
        """All layers: hidden states, and the cache with the tokens' rows."""
        ...

    def draft(
        self, ids_BT: jax.Array, previous_BTD: jax.Array, cache: Cache, step: Step, *, selected: Any = None
    ) -> Hidden:
        """The MTP layer."""
        ...

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits."""
        ...


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
        count_B: int32, how many: the accepted drafts and one more, within the room; 0 for an idle slot.
        stopped_B: whether the last of them is a stop token.
        gap_BT: by how much the token that would have been drawn was ahead of the emitted one, logits and noise together;
            0 but for forced chains.
        hidden_BTD: the target's hidden states at the old position_B + t, right where t < count_B.
        logits_BTV: the target's logits there, of which tokens_BT were drawn; masks are not in them.
        observed: what the network has observed there, a tree of [B, T, …]: nothing, unless it is one that does.
    """

    state: DecodeState
    tokens_BT: Int32[Array, "B T"]
    count_B: Int32[Array, "B"]
    stopped_B: Bool[Array, "B"]
    gap_BT: Float[Array, "B T"]
    hidden_BTD: Float[Array, "B T D"]
    logits_BTV: Float[Array, "B T V"]
    observed: Any


def prefill(
    model: Network, cache: Cache, tail_BD: Float[Array, "B D"], ids_BT: Int[Array, "B T"], step: Step
) -> tuple[Float[Array, "B T D"], Cache]:
    """A chunk of prompt tokens: their hidden states, and the cache with their rows, the MTP layer's too.

    Args:
        model: the network.
        cache: with rows of the tokens before the chunk.
        tail_BD: hidden state of the last of those; anything before the first chunk.
        ids_BT: tokens; anything where `step` says padding.
        step: of the tokens.
    """
    out = model.backbone(ids_BT, cache, step)
    return out.hidden_BTD, commit(model, out.cache, tail_BD, ids_BT, out.hidden_BTD, step)


def begin(
    model: Network,
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


def speculate(
    model: Network,
    state: DecodeState,
    *,
    num_draft: int,
    room_B: Int[Array, "B"] | None = None,
    stop_BU: Int[Array, "B U"] | None = None,
    commits: bool = True,
) -> Round:
    """One round of draft and verification.

    Every shape follows from the arguments and the state keeps its own: it can be the body of a `lax.while_loop`. A
    caller ends a sequence (a limit, an abort) by setting its position to −1.

    Args:
        model: the network, with its MTP layer unless `num_draft` is 0.
        state: of the sequences.
        num_draft: how many tokens to draft; 0 is plain decoding, which still writes the MTP layer's rows.
        room_B: as for `verify`.
        stop_BU: as for `verify`.
        commits: as for `verify`.

    Raises:
        ValueError: drafts are asked of a model without an MTP layer.
    """
    chain_BT, cache = _draft(model, state, num_draft)
    state = dataclasses.replace(state, cache=cache)
    return verify(model, state, chain_BT, room_B=room_B, stop_BU=stop_BU, commits=commits)


def verify(
    model: Network,
    state: DecodeState,
    chain_BT: Int32[Array, "B T"],
    *,
    room_B: Int[Array, "B"] | None = None,
    stop_BU: Int[Array, "B U"] | None = None,
    forced_B: Bool[Array, "B"] | None = None,
    allowed_BTW: Int32[Array, "B T W"] | None = None,
    commits: bool = True,
) -> Round:
    """What the target emits along a chain of guesses, whoever made them: drafts, a grammar, or a record to be confirmed.

    What is emitted, what is counted and what has rows is the same, also where the room or a stop token ends a chain.

    Args:
        model: the network.
        state: of the sequences.
        chain_BT: each sequence's newest token and guesses of those after it.
        room_B: most tokens to emit, or None for as many as there are: the rows that a cache has left, for it drops
            those beyond, and what is read afterwards would not be theirs.
        stop_BU: tokens after which nothing more is emitted; −1 for none.
        forced_B: sequences that emit their chain whatever would have been drawn; None for none.
        allowed_BTW: tokens that may come after each of the chain (`glmjax.model.sampling.allow`); None for all.
        commits: whether to `commit`; a caller who does not draft may do so later, for many rounds at once.
    """
    length = chain_BT.shape[1]
    step = state.cache.step(_positions(state.position_B, length))
    with jax.named_scope("verify"):
        out = model.backbone(chain_BT, state.cache, step)
        logits_BTV = model.head(out.hidden_BTD)
        room_B = jnp.full_like(state.position_B, length) if room_B is None else room_B
        stop_BU = jnp.full((chain_BT.shape[0], 1), -1, jnp.int32) if stop_BU is None else stop_BU
        forced_B = jnp.zeros(chain_BT.shape[0], bool) if forced_B is None else forced_B
        drawn_BTV = logits_BTV if allowed_BTW is None else allow(logits_BTV, allowed_BTW)
        tokens_BT, gap_BT, stopped_B, sampling = _accept(drawn_BTV, chain_BT, state, room_B, stop_BU, forced_B)
    count_B = jnp.sum(tokens_BT >= 0, axis=1, dtype=jnp.int32)

    kept_BT = jnp.arange(length) < count_B[:, None]
    kept = out.cache.step(jnp.where(kept_BT, step.positions_BT, -1))
    cache = commit(model, out.cache, state.tail_BD, chain_BT, out.hidden_BTD, kept) if commits else out.cache
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    newest_B = jnp.take_along_axis(tokens_BT, last_B1, axis=1)[:, 0]
    after = DecodeState(
        cache=cache,
        tail_BD=last_token(kept, out.hidden_BTD, state.tail_BD),
        token_B=jnp.where(count_B > 0, newest_B, state.token_B),
        position_B=state.position_B + count_B,
        sampling=sampling,
    )
    return Round(after, tokens_BT, count_B, stopped_B, gap_BT, out.hidden_BTD, logits_BTV, out.observed)


def commit(
    model: Network,
    cache: Cache,
    tail_BD: Float[Array, "B D"],
    ids_BT: Int[Array, "B T"],
    hidden_BTD: Float[Array, "B T D"],
    step: Step,
) -> Cache:
    """With the MTP layer's rows of tokens that the target has read. Nothing of the layer but its rows is computed.

    Args:
        model: the network; without an MTP layer there is nothing to do.
        cache: with the target's rows of these tokens.
        tail_BD: the target's hidden state of the token before each sequence's first.
        ids_BT: the tokens.
        hidden_BTD: the target's hidden states of them.
        step: of the tokens that count.
    """
    if model.mtp is None:
        return cache
    # A stretch of one needs nothing of the target, and XLA, free to write before the target has read, copies the cache.
    tail_BD, hidden_BTD = lax.optimization_barrier((tail_BD, hidden_BTD))
    return model.draft(ids_BT, previous_hidden(hidden_BTD, tail_BD), cache, step).cache


class _Drafting(NamedTuple):
    """Between two drafts: what the cache and the counts would be, the newest token, and hidden states before it."""

    cache: Any
    sampling: SamplingState
    token_B: jax.Array
    hidden_B1D: jax.Array


def _draft(model: Network, state: DecodeState, num_draft: int) -> tuple[jax.Array, Cache]:
    """The newest token and the drafts after it [B, T], and the cache with the provisional MTP rows."""

    def draft(before: _Drafting, n: Any, selected: Any = None) -> tuple[_Drafting, Any]:
        step = before.cache.step(_positions(state.position_B, 1, n))
        out = model.draft(before.token_B[:, None], before.hidden_B1D, before.cache, step, selected=selected)
        token_B = sample(model.head(out.hidden_BTD)[:, 0], before.sampling, state.position_B + n + 1)
        sampling = observe(before.sampling, token_B, state.position_B >= 0)  # penalties count the drafts before
        return _Drafting(out.cache, sampling, token_B, out.hidden_BTD), out.selected

    def next_draft(before: _Drafting, n: jax.Array) -> tuple[_Drafting, jax.Array]:
        after, _ = draft(before, n, selected)
        return after, after.token_B

    if not num_draft:
        return state.token_B[:, None], state.cache
    drafting = _Drafting(state.cache, state.sampling, state.token_B, state.tail_BD[:, None].astype(model.dtype))
    chain, selected = [state.token_B[None]], None
    if model.config.index_share_for_mtp_iteration:  # all read what the first one selects
        drafting, selected = draft(drafting, 0)
        chain.append(drafting.token_B[None])
    drafting, token_TB = lax.scan(next_draft, drafting, jnp.arange(len(chain) - 1, num_draft, dtype=jnp.int32))
    return jnp.concatenate([*chain, token_TB]).T, drafting.cache


def _accept(
    logits_BTV: jax.Array,
    chain_BT: jax.Array,
    state: DecodeState,
    room_B: jax.Array,
    stop_BU: jax.Array,
    forced_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, SamplingState]:
    """The tokens after each of the chain, as far as they lead along it, and their gaps; which met a stop; all counted."""
    length = chain_BT.shape[1]
    guess_BT = jnp.pad(chain_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)

    def draw(
        carry: tuple[SamplingState, jax.Array, jax.Array], t: jax.Array
    ) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        sampling, emits_B, stopped_B = carry
        emits_B &= t < room_B
        scores_BV, guess_B = noisy(logits_BTV[:, t], sampling, state.position_B + t + 1), guess_BT[:, t]
        token_B = jnp.argmax(scores_BV, axis=1).astype(jnp.int32)
        token_B = jnp.where(forced_B & (guess_B >= 0), guess_B, token_B)
        gap_B = jnp.max(scores_BV, axis=1) - jnp.take_along_axis(scores_BV, token_B[:, None], axis=1)[:, 0]
        sampling = observe(sampling, token_B, emits_B)
        stops_B = emits_B & jnp.any(token_B[:, None] == stop_BU, axis=1)
        goes_on_B = emits_B & ~stops_B & (token_B == guess_B)
        emitted = jnp.where(emits_B, token_B, -1), jnp.where(emits_B, gap_B, 0)
        return (sampling, goes_on_B, stopped_B | stops_B), emitted

    carry = (state.sampling, state.position_B >= 0, jnp.zeros(room_B.shape, bool))
    (sampling, _, stopped_B), (tokens_TB, gap_TB) = lax.scan(draw, carry, jnp.arange(length))
    return tokens_TB.T, gap_TB.T, stopped_B, sampling


def _positions(position_B: jax.Array, length: int, begin: Any = 0) -> jax.Array:
    """Of `length` tokens each, `begin` tokens after a given one; −1 for idle slots."""
    position_BT = position_B[:, None] + begin + jnp.arange(length, dtype=jnp.int32)
    return jnp.where(position_B[:, None] >= 0, position_BT, -1)
