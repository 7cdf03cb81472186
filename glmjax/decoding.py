"""The loop behind `GLM.generate`: prefill in chunks, then several steps per dispatch, streamed as text."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from glmjax.model.cache import ContiguousCache, last_token
from glmjax.model.reply import Reply
from glmjax.model.sampling import Logprobs, logprobs, observe, sample
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.model.stops import Stops
from glmjax.model.tokenizer import Tokenizer
from glmjax.model.transformer import Transformer

_SMALLEST_CHUNK, _LARGEST_CHUNK = 16, 512
_SMALLEST_CACHE = 256
_FEWEST_STOPS = 16  # stop tokens that a program is compiled for
_MOST_STEPS = 32  # of one dispatch
_DISPATCH_SECONDS = 0.1  # that a dispatch should take, since its tokens are shown together


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token, as it is streamed.

    Attributes:
        id: in the vocabulary.
        text: what can be shown now; may be empty while a character or a possible stop string is incomplete.
        finish_reason: "stop" (an end-of-sequence or stop token, a stop string) or "length" on the last token, else
            None. A stop token's own text is not shown.
        logprob: log of its probability in the model's own distribution, where logprobs were asked for.
        rank: its place in that distribution, from 1.
        top_logprobs: the best alternatives (id, logprob), as many as were asked for.
    """

    id: int
    text: str
    finish_reason: str | None = None
    logprob: float | None = None
    rank: int | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one generation. Times include compilation where a shape is met for the first time.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated.
        first_token_seconds: from the start to the first token.
        decode_seconds: from the second token to the last; the step before it is the one that compiles.
        seed: the sampling seed, with which the output can be had again.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_seconds: float
    seed: int | None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over `decode_seconds`; 0 for fewer than three tokens."""
        return (self.new_tokens - 2) / self.decode_seconds if self.new_tokens > 2 else 0.0


class Generation:
    """A generation under way: iterate over it for tokens as they come; once exhausted it knows the whole.

    Nothing runs before the first token is asked for.

    Args:
        model: the network.
        prompt_ids: at least one, and within the context together with `new_tokens`.
        params: validated; with a seed where the temperature is above 0.
        stops: the model's and the request's.
        tokenizer: for the text, or None.
        new_tokens: most tokens to generate.
        cache_dtype: of cached rows.

    Attributes:
        prompt_ids: what was prefilled.
    """

    def __init__(
        self,
        model: Transformer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stops: Stops,
        tokenizer: Tokenizer | None,
        new_tokens: int,
        cache_dtype: jnp.dtype,
    ):
        self.prompt_ids = list(prompt_ids)
        self._reply = Reply(stops, tokenizer, params, new_tokens)
        self._model, self._params, self._stops, self._tokenizer = model, params, stops, tokenizer
        self._new_tokens, self._cache_dtype = new_tokens, cache_dtype
        self._times: list[float] = []  # when it began, and each token came
        self._tokens = self._run()

    @property
    def ids(self) -> list[int]:
        """Generated so far, a final stop token included."""
        return self._reply.ids

    @property
    def text(self) -> str:
        """Shown so far."""
        return self._reply.text

    @property
    def finish_reason(self) -> str | None:
        """None until it ends."""
        return self._reply.finish_reason

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def finish(self) -> Generation:
        """Run to the end."""
        for _ in self:
            pass
        return self

    @property
    def statistics(self) -> Statistics:
        """Of what has been generated so far. A reader who takes its time between tokens is part of the times."""
        began, *times = self._times or [0.0]
        first = times[0] - began if times else 0.0
        decode = times[-1] - times[1] if len(times) > 2 else 0.0
        return Statistics(len(self.prompt_ids), len(self.ids), first, decode, self._params.seed)

    def _run(self) -> Iterator[Token]:
        self._times.append(time.perf_counter())
        for token, scores in self._sampled():
            self._times.append(time.perf_counter())
            text = self._reply.push(token)
            yield _token(token, text, self.finish_reason, scores)
            if self.finish_reason:
                return

    def _sampled(self) -> Iterator[tuple[int, Logprobs | None]]:
        """Tokens without end: the prompt's prefill, then as many steps per dispatch as make up `_DISPATCH_SECONDS`."""
        model, params, n = self._model, self._params, self._params.logprobs
        length, vocab = len(self.prompt_ids), model.config.vocab_size
        rows = min(_capacity(length + self._new_tokens), model.config.max_position_embeddings)
        cache = empty(model, rows, self._cache_dtype)
        tokens = self._tokenizer.vocab_size if self._tokenizer else None
        state = SamplingState.from_params([params], [self.prompt_ids], vocab, tokens, [self._stops.token_ids])

        chunk = min(_power_of_two(length, _SMALLEST_CHUNK), _LARGEST_CHUNK)
        for begin in range(0, length, chunk):
            ids = np.zeros((1, chunk), np.int32)
            positions = np.full((1, chunk), -1, np.int32)
            piece = self.prompt_ids[begin : begin + chunk]
            ids[0, : len(piece)], positions[0, : len(piece)] = piece, np.arange(begin, begin + len(piece))
            hidden_BD, cache = prefill(model, cache, ids, positions)
        token, scores, state = first_token(model, hidden_BD, state, np.int32([length]), n)
        token = np.asarray(token)
        yield int(token[0]), scores
        stop_ids = np.full(_power_of_two(len(self._stops.token_ids), _FEWEST_STOPS), -1, np.int32)
        stop_ids[: len(self._stops.token_ids)] = sorted(self._stops.token_ids)
        position, steps = length, 1
        while True:
            steps = min(steps, self._new_tokens - len(self.ids))
            began = time.perf_counter()
            run, state, cache = decode(model, cache, state, token, np.int32([position]), np.int32(steps), stop_ids, n)
            count, tokens = int(run.count), np.asarray(run.token_ZB)
            seconds = time.perf_counter() - began
            for z in range(count):
                yield int(tokens[z, 0]), jax.tree.map(lambda x, z=z: x[z], run.scores)
            token, position = tokens[count - 1], position + count
            if seconds > _DISPATCH_SECONDS:
                steps = max(steps // 2, 1)
            elif 2 * seconds < _DISPATCH_SECONDS:
                steps = min(2 * steps, _MOST_STEPS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a dispatch of `decode` generated. Z is `_MOST_STEPS`.

    Attributes:
        token_ZB: tokens, the first `count` of them.
        scores: their logprobs, where asked for, with a leading axis Z.
        count: steps that were run, at least one.
    """

    token_ZB: jax.Array
    scores: Logprobs | None
    count: jax.Array


@functools.partial(jax.jit, static_argnames=("rows", "dtype"), keep_unused=True)
def empty(model: Transformer, rows: int, dtype: jnp.dtype) -> ContiguousCache:
    """An empty cache that lives where the model does, like those to come: else `prefill` would be compiled twice."""
    return ContiguousCache.create(model.config, 1, rows, dtype, model_dtype=model.dtype)


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    model: Transformer, cache: ContiguousCache, ids_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, ContiguousCache]:
    """Rows of a chunk of prompt tokens (position −1 is padding), and the hidden state of its last token [B, D]."""
    step = cache.step(positions_BT)
    out = model.backbone(ids_BT, cache, step)
    return last_token(step, out.hidden_BTD, cache.tail_BD), out.cache


@functools.partial(jax.jit, static_argnames="n", donate_argnames="state")
def first_token(
    model: Transformer, hidden_BD: jax.Array, state: SamplingState, position_B: jax.Array, n: int | None
) -> tuple[jax.Array, Logprobs | None, SamplingState]:
    """The token after the prompt."""
    return _draw(model, hidden_BD, state, position_B, n)


@functools.partial(jax.jit, static_argnames="n", donate_argnames=("cache", "state"))
def decode(
    model: Transformer,
    cache: ContiguousCache,
    state: SamplingState,
    token_B: jax.Array,
    position_B: jax.Array,
    steps: jax.Array,
    stop_ids: jax.Array,
    n: int | None,
) -> tuple[Decoded, SamplingState, ContiguousCache]:
    """The tokens after `token_B`, which is at `position_B`: `steps` of them, fewer where all sequences meet a stop.

    Args:
        model: the network.
        cache: with the rows of everything before.
        state: sampling parameters and counts.
        token_B: the last token of each sequence, without rows yet.
        position_B: where it is.
        steps: from 1 to `_MOST_STEPS`; one program serves all of them.
        stop_ids: tokens after which a sequence needs no more; −1 for none.
        n: logprobs to return, or None.
    """

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        run, state, cache, token_B, stopped_B = carry
        position_B1 = (position_B + run.count)[:, None]
        out = model.backbone(token_B[:, None], cache, cache.step(position_B1))
        token_B, scores, state = _draw(model, out.hidden_BTD[:, 0], state, position_B1[:, 0] + 1, n)
        store = functools.partial(lax.dynamic_update_index_in_dim, index=run.count, axis=0)
        kept = jax.tree.map(lambda all_Z, one: store(all_Z, one), run.scores, scores)
        run = Decoded(store(run.token_ZB, token_B), kept, run.count + 1)
        return run, state, out.cache, token_B, stopped_B | jnp.isin(token_B, stop_ids)

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        run, *_, stopped_B = carry
        return (run.count < steps) & ~jnp.all(stopped_B)

    shapes = jax.eval_shape(lambda: _draw(model, jnp.zeros_like(cache.tail_BD), state, position_B, n)[:2])
    token_ZB, scores = jax.tree.map(lambda x: jnp.zeros((_MOST_STEPS, *x.shape), x.dtype), shapes)
    begin = (Decoded(token_ZB, scores, jnp.int32(0)), state, cache, token_B, jnp.zeros(token_B.shape, bool))
    run, state, cache, *_ = lax.while_loop(unfinished, step, begin)
    return run, state, cache


def _draw(
    model: Transformer, hidden_BD: jax.Array, state: SamplingState, position_B: jax.Array, n: int | None
) -> tuple[jax.Array, Logprobs | None, SamplingState]:
    logits_BV = model.head(hidden_BD[:, None])[:, 0]
    token_B = sample(logits_BV, state, position_B)
    scores = None if n is None else logprobs(logits_BV, token_B, n)
    return token_B, scores, observe(state, token_B, jnp.ones(token_B.shape, bool))


def _token(token: int, text: str, finish_reason: str | None, scores: Logprobs | None) -> Token:
    if scores is None:
        return Token(token, text, finish_reason)
    emitted, rank, ids, values = (np.asarray(x)[0] for x in scores)
    top = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))
    return Token(token, text, finish_reason, float(emitted), int(rank), top)


def _capacity(tokens: int) -> int:
    """Rows for so many tokens: four sizes between powers of two, for few programs and little waste."""
    quarter = _power_of_two(tokens, _SMALLEST_CACHE) // 8  # of the stretch between two powers
    return max(_SMALLEST_CACHE, -(-tokens // quarter) * quarter)


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
