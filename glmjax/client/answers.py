"""What a worker's responses say: pieces of text as they come, and whole answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from smg_grpc_proto import vllm_engine_pb2 as pb

from glmjax.model.output_text import OutputText
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """The model's own opinion of a token, before penalties and temperature.

    Attributes:
        logprob: log of its probability.
        top: the best alternatives (id, logprob), as many as were asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some tokens of a sequence.

    Attributes:
        text: what can be shown now.
        ids: new tokens.
        index: which of the n sequences.
        scores: one for each token, where logprobs were asked for.
        finish_reason: "stop", "length" or "abort" with the last piece, else None.
        prompt_tokens: of the prompt.
        cached_tokens: of these, found in the cache.
    """

    text: str
    ids: tuple[int, ...] = ()
    index: int = 0
    scores: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole sequence.

    Attributes:
        text: without what ended it.
        ids: its tokens, a final stop token included.
        finish_reason: "stop", "length" or "abort".
        scores: one for each token, where logprobs were asked for.
        prompt_tokens: of the prompt.
        cached_tokens: of these, found in the cache.
        prompt_scores: of the prompt's tokens from the second on, where they were asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    scores: tuple[TokenScore, ...]
    prompt_tokens: int
    cached_tokens: int
    prompt_scores: tuple[TokenScore, ...] = ()


class Reading:
    """Of one request's responses.

    Args:
        tokenizer: the worker's, for text; None for none.
        ends: tokens that have no text: what ended a sequence.
        params: that were sent: they say which stop strings count, from when on, and what is left in the text.
    """

    def __init__(self, tokenizer: Tokenizer | None, ends: frozenset[int], params: SamplingParams):
        self._tokenizer, self._ends, self._params = tokenizer, ends, params
        self._texts: dict[int, _Text] = {}

    def piece(self, response: pb.GenerateResponse) -> Piece:
        """What a response of a stream says."""
        told = getattr(response, response.WhichOneof("response"))
        text = self._texts.setdefault(told.index, _Text(self))
        counts = {"index": told.index, "prompt_tokens": told.prompt_tokens, "cached_tokens": told.cached_tokens}
        if response.HasField("complete"):
            return Piece(text.end(), finish_reason=told.finish_reason, **counts)
        return Piece(text.push(told.token_ids), tuple(told.token_ids), scores=_scores(told.output_logprobs), **counts)

    def answer(self, complete: pb.GenerateComplete) -> Answer:
        """What the only response of a sequence that is not streamed says."""
        text = _Text(self)
        return Answer(
            text=text.push(complete.output_ids) + text.end(),
            ids=tuple(complete.output_ids),
            finish_reason=complete.finish_reason,
            scores=_scores(complete.output_logprobs),
            prompt_tokens=complete.prompt_tokens,
            cached_tokens=complete.cached_tokens,
            prompt_scores=_prompt_scores(complete.input_logprobs),
        )


class _Text:
    """Of one sequence."""

    def __init__(self, reading: Reading):
        self._ends, params = reading._ends, reading._params
        self._text = OutputText(reading._tokenizer, params.stop, params, params.max_new_tokens)

    def push(self, ids: Iterable[int]) -> str:
        return "".join(self._text.push(token, silent=token in self._ends)[0] for token in ids)

    def end(self) -> str:
        return self._text.flush()[0]


def _scores(told: pb.OutputLogProbs) -> tuple[TokenScore, ...]:
    return tuple(map(TokenScore, told.token_logprobs, _alternatives(told)))


def _prompt_scores(told: pb.InputLogProbs) -> tuple[TokenScore, ...]:
    """Of all tokens but the first, which has none."""
    return tuple(map(TokenScore, (score.value for score in told.token_logprobs), _alternatives(told)))[1:]


def _alternatives(told: pb.OutputLogProbs | pb.InputLogProbs) -> Iterator[tuple[tuple[int, float], ...]]:
    for top in told.top_logprobs:
        yield tuple(zip(top.token_ids, top.values, strict=True))
    yield from [()] * (len(told.token_logprobs) - len(told.top_logprobs))
