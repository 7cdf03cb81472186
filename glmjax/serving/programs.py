"""What is dispatched: prompts read in chunks, and rounds of decoding; each a function of a plan, a cache and the slots.

Every program begins with the retirements and the verdict, goes on with the sequences that are as their plan says, and
ends with a log: what happened to each of them, and the epoch it happened at.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from glmjax.model.cache import last_token
from glmjax.model.sampling import Logprobs, allow, logprobs, noisy, observe
from glmjax.model.sampling_params import MAX_LOGPROBS
from glmjax.pallas.blocks import map_query_blocks, window_start
from glmjax.serving import pages
from glmjax.serving.hooks import Hooks, hooked
from glmjax.serving.pages import OK, PagedCache, PageTable
from glmjax.serving.slots import Slots
from glmjax.serving.view import PagedView
from glmjax.speculation import DecodeState, commit, speculate, verify

_COMMITTED_ROUNDS = 8
"""Rounds whose MTP rows are written at a time: a dispatch may have room for many more than it runs."""
_LOGITS_BYTES = 64 << 20
"""Of a prompt's logits that are there at once."""

Given = jax.Array | np.ndarray
"""Of a plan: the host's array, or what it is within the program."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The sequences of a dispatch, whatever it does with them: a plan's arrays, made anew for every dispatch.

    Attributes:
        slot_B: int32, each sequence's slot; −1 for padding.
        generation_B: int32, of the slot while it is theirs.
        table: leases of their pages.
        stop_BU: int32, tokens that end them; −1 for none.
        retire_Z: int32, pages to retire before anything else; −1 for none.
        scored: bool, whether one of them asked for logprobs.
        hook_B: int32, each sequence's treatment (`glmjax.serving.hooks`), 0 for none; None in programs without hooks.
    """

    slot_B: Any
    generation_B: Any
    table: PageTable
    stop_BU: Any
    retire_Z: Any
    scored: Any
    hook_B: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """What a prefill reads.

    Attributes:
        ids_BT: int32, a chunk of each prompt.
        begin_B: int32, position of its first token, which is a page's first.
        count_B: int32, tokens of it; 0 where the whole prompt is cached.
        final_B: bool, the prompt ends here: draw the token after it.
        first_B: int32, a token to emit instead of drawing one, −1 for none: a record that is to be confirmed.
        target_BT: int32, the prompt's next token, whose logprob is asked for, or −1.
        allowed_BW: int32, masks of the token that is drawn (`glmjax.model.sampling.allow`); None without grammars.
    """

    ids_BT: Any
    begin_B: Any
    count_B: Any
    final_B: Any
    first_B: Any
    target_BT: Any
    allowed_BW: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guesses:
    """Tokens that the host knows of.

    Attributes:
        guess_BT: int32, the tokens after each sequence's newest; −1 after the last.
        forced_B: bool, emit them whatever would have been drawn, and tell by how much that was ahead.
        allowed_BTW: int32, masks of the tokens after the newest and after each guess; None without grammars.
    """

    guess_BT: Any
    forced_B: Any
    allowed_BTW: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Log:
    """What a dispatch did. S tokens at most of each sequence.

    Attributes:
        tokens_BS: int32, emitted tokens in order, −1 after them.
        count_ZB: int32, how many of them each round gave; a prefill is one round.
        position_B: int32, of each sequence's newest token; −1 where it has none, or took no part.
        stopped_B: bool, it is a stop token.
        fault_B: int32, the verdict; where it is not `OK`, nothing was done.
        rounds: int32, that were run.
        epoch: int32, of the cache after it.
        gap_BS: float32, by how much another token was ahead of each that was given; see `glmjax.speculation.Round`.
        scores_BS: `Logprobs` of the tokens, where a sequence of the batch asked for them; zeros otherwise.
        captured_BS: what hooks have captured of the tokens that were read, by layer, trees of [B, S, …]: from the first
            token of a chunk, or the newest one before rounds. Nothing without hooks.
        targets_BT: `Logprobs` of a chunk's targets; zeros where there are none, None of rounds.
    """

    tokens_BS: Any
    count_ZB: Any
    position_B: Any
    stopped_B: Any
    fault_B: Any
    rounds: Any
    epoch: Any
    gap_BS: Any
    scores_BS: Any
    captured_BS: Any = dataclasses.field(default_factory=dict)
    targets_BT: Any = None


def read_chunks(
    model: Any, cache: PagedCache, slots: Slots, batch: Batch, chunks: Chunks, hooks: Hooks | None = None
) -> tuple[Any, ...]:
    """A chunk of each prompt; where it is the last, the first token is drawn and the slot begins to decode.

    Args:
        model: the network.
        cache: donated.
        slots: donated; admitted before.
        batch: the sequences.
        chunks: their tokens.
        hooks: what else is done in layers.

    Returns:
        The cache, the slots and the log.
    """
    model = hooked(model, hooks, batch.hook_B)
    cache = pages.retire(cache, batch.retire_Z)
    owned_B = slots.owned(batch.slot_B, batch.generation_B)
    begin_B = jnp.where(owned_B, chunks.begin_B, -1)
    fault_B = pages.verdict(cache, batch.table, begin_B)
    takes_part_B = owned_B & (fault_B == OK)
    count_B = jnp.where(takes_part_B, chunks.count_B, 0)
    length_B = begin_B + count_B

    view = PagedView.of(cache, batch.table, fault_B)
    offset_T = jnp.arange(chunks.ids_BT.shape[1], dtype=jnp.int32)
    step = view.step(jnp.where(offset_T < count_B[:, None], begin_B[:, None] + offset_T, -1))
    # The tails are read before they are written; else XLA may copy all of them.
    before_BD, tail_GD = lax.optimization_barrier((pages.tails_before(cache, batch.table, begin_B), cache.tail_GD))
    out = model.backbone(chunks.ids_BT, view, step)
    hidden_BTD, view = out.hidden_BTD, commit(model, out.cache, before_BD, chunks.ids_BT, out.hidden_BTD, step)
    tail_GD = pages.tails_after(tail_GD, cache.page_size, batch.table, begin_B, count_B, hidden_BTD)
    ready_G = pages.advance(cache, batch.table, jnp.where(takes_part_B, length_B, -1))
    cache = view.back(cache, tail_GD, ready_G)

    mine, draws_B = slots.take(batch.slot_B), takes_part_B & chunks.final_B
    tail_BD = last_token(step, hidden_BTD, before_BD)
    logits_B1V = model.head(tail_BD[:, None].astype(model.dtype))
    drawn_BV = logits_B1V[:, 0] if chunks.allowed_BW is None else allow(logits_B1V[:, 0], chunks.allowed_BW)
    scores_BV = noisy(drawn_BV, mine.sampling, length_B)
    token_B = jnp.where(chunks.first_B >= 0, chunks.first_B, jnp.argmax(scores_BV, axis=1)).astype(jnp.int32)
    gap_B1 = jnp.max(scores_BV, axis=1, keepdims=True) - jnp.take_along_axis(scores_BV, token_B[:, None], axis=1)
    stopped_B = draws_B & jnp.any(token_B[:, None] == batch.stop_BU, axis=1)
    begun = Slots(
        generation_B=mine.generation_B,
        position_B=jnp.where(stopped_B, -1, length_B),
        token_B=token_B,
        tail_BD=tail_BD.astype(mine.tail_BD.dtype),
        sampling=observe(mine.sampling, token_B, draws_B),
    )
    tokens_B1 = jnp.where(draws_B, token_B, -1)[:, None]
    log = Log(
        tokens_BS=tokens_B1,
        count_ZB=draws_B.astype(jnp.int32)[None],
        position_B=jnp.where(draws_B, length_B, -1),
        stopped_B=stopped_B,
        fault_B=fault_B,
        rounds=jnp.int32(1),
        epoch=cache.epoch,
        gap_BS=jnp.where(draws_B[:, None], gap_B1, 0),
        scores_BS=_scores(batch.scored, logits_B1V, tokens_B1),
        captured_BS=out.observed if hooks else {},
        targets_BT=_target_scores(model, hidden_BTD, chunks.target_BT),
    )
    return cache, slots.put(batch.slot_B, begun, draws_B), log


def decode_rounds(
    model: Any,
    cache: PagedCache,
    slots: Slots,
    batch: Batch,
    end_B: Given,
    rounds: Given,
    *,
    num_draft: int,
    most_rounds: int,
    hooks: Hooks | None = None,
) -> tuple[PagedCache, Slots, Log]:
    """Rounds of draft and verification, until all sequences have stopped or are out of room.

    A sequence's stretch, what it emits here, has S = most_rounds · (num_draft + 1) places.

    Args:
        model: the network.
        cache: donated.
        slots: donated.
        batch: the sequences.
        end_B: int32, position that a sequence's newest token may reach: pages, limit and context allow no more.
        rounds: int32, how many at most, up to `most_rounds`.
        num_draft: tokens to draft in each.
        most_rounds: Z, which the log has room for.
        hooks: what else is done in layers.

    Returns:
        The cache, the slots and the log.
    """
    model = hooked(model, hooks, batch.hook_B)
    running = _Running.of(cache, slots, batch, end_B)
    begin_B = running.state.position_B
    sequence_B1, offset_T = jnp.arange(len(begin_B))[:, None], jnp.arange(num_draft + 1)

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        n, state, stopped_B, *_ = carry
        return (n < rounds) & jnp.any(running.room_B(state, stopped_B) > 0)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        n, state, stopped_B, count_ZB, stretch = carry
        room_B, position_B = running.room_B(state, stopped_B), state.position_B
        drafting = dataclasses.replace(state, position_B=jnp.where(room_B > 0, position_B, -1))
        out = speculate(
            model, drafting, num_draft=num_draft, room_B=room_B, stop_BU=batch.stop_BU, commits=num_draft > 0
        )
        at = sequence_B1, (position_B - begin_B)[:, None] + offset_T
        captured = out.observed if hooks else {}
        emitted = out.tokens_BT, out.hidden_BTD, _scores(batch.scored, out.logits_BTV, out.tokens_BT), captured
        return (
            n + 1,
            dataclasses.replace(out.state, position_B=position_B + out.count_B),
            stopped_B | out.stopped_B,
            lax.dynamic_update_index_in_dim(count_ZB, out.count_B, n, 0),
            jax.tree.map(lambda whole, new: whole.at[at].set(new, mode="drop"), stretch, emitted),
        )

    mine = running.mine
    shape = len(begin_B), most_rounds * (num_draft + 1)
    tokens_BS, hidden_BSD = jnp.full(shape, -1, jnp.int32), jnp.zeros((*shape, mine.tail_BD.shape[1]), model.dtype)
    captured_BS = _no_captures(model, running.state, num_draft + 1, shape[1]) if hooks else {}
    stretch = tokens_BS, hidden_BSD, _no_scores(shape, mine.sampling.bias_BV.shape[1]), captured_BS
    nothing = jnp.zeros(shape[0], bool), jnp.zeros((most_rounds, shape[0]), jnp.int32)
    n, state, stopped_B, count_ZB, stretch = lax.while_loop(
        unfinished, body, (jnp.int32(0), running.state, *nothing, stretch)
    )
    tokens_BS, hidden_BSD, scores_BS, captured_BS = stretch
    if not num_draft:  # nobody drafts, so nobody has read the MTP layer's rows: write those of many rounds at once
        read_BS = jnp.concatenate([mine.token_B[:, None], tokens_BS[:, :-1]], axis=1)
        view = _commit_rounds(model, state.cache, begin_B, state.position_B, mine.tail_BD, read_BS, hidden_BSD, n)
        state = dataclasses.replace(state, cache=view)
    no_gap_BS = jnp.zeros(shape)
    return running.after(state, stopped_B, tokens_BS, no_gap_BS, hidden_BSD, scores_BS, captured_BS, count_ZB, n)


def _commit_rounds(
    model: Any,
    view: PagedView,
    begin_B: jax.Array,
    end_B: jax.Array,
    tail_BD: jax.Array,
    read_BS: jax.Array,
    hidden_BSD: jax.Array,
    rounds: jax.Array,
) -> PagedView:
    """With MTP rows begin … end − 1 of each sequence: of what was read in rounds without drafts, some rounds at a time."""
    most = read_BS.shape[1]
    size = min(most, _COMMITTED_ROUNDS)
    offset_T = jnp.arange(size, dtype=jnp.int32)

    def some(n: jax.Array, view: PagedView) -> PagedView:
        start = window_start(n, size, most)
        ids_BT, hidden_BTD = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (read_BS, hidden_BSD))
        before_BD = jnp.where(start > 0, hidden_BSD[:, start - 1], tail_BD.astype(hidden_BSD.dtype))
        position_BT = begin_B[:, None] + start + offset_T
        step = view.step(jnp.where(position_BT < end_B[:, None], position_BT, -1))
        return commit(model, view, before_BD, ids_BT, hidden_BTD, step)

    return lax.fori_loop(0, -(-rounds // size), some, view)


def verify_chain(
    model: Any,
    cache: PagedCache,
    slots: Slots,
    batch: Batch,
    end_B: Given,
    guesses: Guesses,
    hooks: Hooks | None = None,
) -> tuple[PagedCache, Slots, Log]:
    """One round along tokens that the host knows: what a grammar forces, or a record that is to be confirmed.

    Args:
        model: the network.
        cache: donated.
        slots: donated.
        batch: the sequences.
        end_B: as for `decode_rounds`.
        guesses: what to verify, T − 1 tokens.
        hooks: what else is done in layers.

    Returns:
        The cache, the slots and the log.
    """
    model = hooked(model, hooks, batch.hook_B)
    running = _Running.of(cache, slots, batch, end_B)
    state = running.state
    room_B = running.room_B(state, jnp.zeros(len(state.position_B), bool))
    chain_BT = jnp.concatenate([state.token_B[:, None], guesses.guess_BT], axis=1)
    reading = dataclasses.replace(state, position_B=jnp.where(room_B > 0, state.position_B, -1))
    out = verify(
        model,
        reading,
        chain_BT,
        room_B=room_B,
        stop_BU=batch.stop_BU,
        forced_B=guesses.forced_B,
        allowed_BTW=guesses.allowed_BTW,
    )
    after = dataclasses.replace(out.state, position_B=state.position_B + out.count_B)
    scores_BS = _scores(batch.scored, out.logits_BTV, out.tokens_BT)
    captured_BS, count_1B = out.observed if hooks else {}, out.count_B[None]
    return running.after(
        after,
        out.stopped_B,
        out.tokens_BT,
        out.gap_BT,
        out.hidden_BTD,
        scores_BS,
        captured_BS,
        count_1B,
        jnp.int32(1),
    )


class _Running(NamedTuple):
    """The sequences of a decoding program: those whose slot is theirs, which have a newest token and all their pages."""

    cache: PagedCache
    slots: Slots
    batch: Batch
    mine: Slots
    state: DecodeState
    takes_part_B: jax.Array
    fault_B: jax.Array
    end_B: jax.Array

    @classmethod
    def of(cls, cache: PagedCache, slots: Slots, batch: Batch, end_B: Given) -> _Running:
        """At the head of a program."""
        cache = pages.retire(cache, batch.retire_Z)
        mine = slots.take(batch.slot_B)
        begin_B = jnp.where(slots.owned(batch.slot_B, batch.generation_B), mine.position_B, -1)
        fault_B = pages.verdict(cache, batch.table, begin_B)
        takes_part_B = (begin_B >= 0) & (fault_B == OK)
        begin_B = jnp.where(takes_part_B, begin_B, 0)
        end_B = jnp.where(takes_part_B, jnp.minimum(end_B, batch.table.capacity_B(cache.page_size)), 0)
        view = PagedView.of(cache, batch.table, fault_B)
        state = DecodeState(view, mine.tail_BD, mine.token_B, begin_B, mine.sampling)
        return cls(cache, slots, batch, mine, state, takes_part_B, fault_B, end_B)

    def room_B(self, state: DecodeState, stopped_B: jax.Array) -> jax.Array:
        """Tokens that each sequence may still emit."""
        return jnp.where(stopped_B, 0, jnp.maximum(self.end_B - state.position_B, 0))

    def after(
        self,
        state: DecodeState,
        stopped_B: jax.Array,
        tokens_BS: jax.Array,
        gap_BS: jax.Array,
        hidden_BSD: jax.Array,
        scores_BS: Logprobs,
        captured_BS: Any,
        count_ZB: jax.Array,
        rounds: jax.Array,
    ) -> tuple[PagedCache, Slots, Log]:
        """At its end."""
        cache, table, begin_B = self.cache, self.batch.table, self.state.position_B
        position_B = jnp.where(self.takes_part_B, state.position_B, -1)
        count_B = state.position_B - begin_B
        tail_GD = pages.tails_after(cache.tail_GD, cache.page_size, table, begin_B, count_B, hidden_BSD)
        cache = state.cache.back(cache, tail_GD, pages.advance(cache, table, position_B))
        resting_B = jnp.where(stopped_B, -1, position_B)
        mine = Slots(self.mine.generation_B, resting_B, state.token_B, state.tail_BD, state.sampling)
        log = Log(
            tokens_BS=tokens_BS,
            count_ZB=count_ZB,
            position_B=position_B,
            stopped_B=stopped_B,
            fault_B=self.fault_B,
            rounds=rounds,
            epoch=cache.epoch,
            gap_BS=gap_BS,
            scores_BS=scores_BS,
            captured_BS=captured_BS,
        )
        return cache, self.slots.put(self.batch.slot_B, mine, self.takes_part_B), log


def _no_captures(model: Any, state: DecodeState, length: int, room: int) -> Any:
    """Zeros for what a loop's rounds of `length` tokens capture, `room` of them in all."""
    ids_BT = jnp.zeros((len(state.position_B), length), jnp.int32)
    one = jax.eval_shape(lambda: model.backbone(ids_BT, state.cache, state.cache.step(ids_BT)).observed)
    return jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], room, *leaf.shape[2:]), leaf.dtype), one)


def _scores(scored: Given, logits_BTV: jax.Array, tokens_BT: jax.Array) -> Logprobs:
    """Logprobs of emitted tokens; zeros where nobody asked."""
    *shape, vocab = logits_BTV.shape
    return lax.cond(scored, lambda: _computed(logits_BTV, tokens_BT), lambda: _no_scores(tuple(shape), vocab))


def _target_scores(model: Any, hidden_BTD: jax.Array, target_BT: jax.Array) -> Logprobs:
    """Logprobs of the tokens after those that were read; zeros where nobody asked. Logits are there a block at a time."""
    batch, length, _ = hidden_BTD.shape
    vocab = model.config.vocab_size

    def block(hidden_BUD: jax.Array, target_BU: jax.Array) -> Logprobs:
        return _computed(model.head(hidden_BUD.astype(model.dtype)), target_BU)

    return lax.cond(
        jnp.any(target_BT >= 0),
        lambda: map_query_blocks(block, 4 * batch * vocab, hidden_BTD, target_BT, budget=_LOGITS_BYTES),
        lambda: _no_scores((batch, length), vocab),
    )


def _computed(logits_BTV: jax.Array, tokens_BT: jax.Array) -> Logprobs:
    *shape, vocab = logits_BTV.shape
    flat = logprobs(logits_BTV.reshape(-1, vocab), jnp.maximum(tokens_BT, 0).reshape(-1), min(MAX_LOGPROBS, vocab))
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), flat)


def _no_scores(shape: tuple[int, ...], vocab: int) -> Logprobs:
    top = (*shape, min(MAX_LOGPROBS, vocab))
    return Logprobs(jnp.zeros(shape), jnp.zeros(shape, jnp.int32), jnp.zeros(top, jnp.int32), jnp.zeros(top))
