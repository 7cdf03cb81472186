"""vLLM's messages and what they mean here: requests into what an engine is asked, what it gives into responses.

Pure functions of messages. proto3 does not tell a field that is 0 from one that was not set, so zeros mean what they do in
vLLM's servicer: the default, where 0 makes no sense. Whatever cannot be served is refused by a `ValueError` that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from smg_grpc_proto import vllm_engine_pb2 as pb

from glmjax.model.sampling_params import SamplingParams
from glmjax.serving.stream import Chunk, Score, Statistics
from glmjax.wire import sampling_params_of

SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name

MAX_N = 128
"""Most sequences of a request (OpenAI's limit)."""

_FINISH_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompt: token ids, or text.
        params: how to sample and when to stop; not validated yet.
        n: sequences.
        keep: of the prompt, the last so many tokens; None for all, −1 for as many as fit.
    """

    prompt: list[int] | str
    params: SamplingParams
    n: int = 1
    keep: int | None = None


def asked_of(request: pb.GenerateRequest, longest: int) -> Asked:
    """What a request asks for.

    Args:
        request: the message.
        longest: most tokens of a prompt; of millions, none is looked at.

    Raises:
        ValueError: something that is not served, or that no request may ask for.
    """
    for name in ("mm_inputs", "media_refs", "kv_transfer_params"):
        if request.HasField(name):
            raise ValueError(f"{name} is set; this worker takes text and tokens, and decodes what it has read itself")
    if request.extra_mm_inputs or request.kv_transfer_params_json:
        raise ValueError("extra_mm_inputs or kv_transfer_params_json is set; leave them out")
    if request.data_parallel_rank:
        raise ValueError(f"data_parallel_rank {request.data_parallel_rank} is set and there is rank 0 alone")
    kind = request.WhichOneof("input")
    if kind is None:
        raise ValueError("the request has no input; give tokenized or text")
    given = request.sampling_params
    keep = _keep(given)
    prompt = request.text if kind == "text" else _ids(request.tokenized, keep, longest)
    if not prompt:
        raise ValueError(f"{kind} is empty; give a token at least")
    n = given.n or 1
    if n > MAX_N:
        raise ValueError(f"n {n} exceeds {MAX_N}; send several requests")
    return Asked(prompt, sampling_params_of(given), n, keep)


def _ids(given: pb.TokenizedInput, keep: int | None, longest: int) -> list[int]:
    """Of a prompt; of one that may be cut, the last."""
    if keep is None and (count := len(given.input_ids)) > longest:
        raise ValueError(f"the prompt's {count} tokens are more than the {longest} that fit; shorten it")
    return given.input_ids[-longest:]


def _keep(given: pb.SamplingParams) -> int | None:
    if not given.HasField("truncate_prompt_tokens"):
        return None
    if (keep := given.truncate_prompt_tokens) < 1 and keep != -1:
        raise ValueError(f"truncate_prompt_tokens {keep} must be at least 1, or -1 for as many as fit")
    return keep


class Telling:
    """One sequence of a request, told to the client as it comes.

    Args:
        index: which of the n.
        stream: tell tokens as they come, and all of them in the end; otherwise only that.
        eos: tokens that end a turn, which are not told as what was matched.

    Attributes:
        prompt: scores of the prompt's tokens, where they were asked for.
    """

    def __init__(self, index: int, *, stream: bool, eos: frozenset[int]):
        self.prompt: pb.InputLogProbs | None = None
        self._index, self._stream, self._eos = index, stream, eos
        self._ids: list[int] = []
        self._scores: list[Score] = []

    def responses(self, chunk: Chunk) -> Iterable[pb.GenerateResponse]:
        """What a chunk of it comes to."""
        first = not self._ids
        self._ids += chunk.ids
        self._scores += () if self._stream else chunk.scores
        counts = _counts(chunk.statistics)
        if self._stream and chunk.ids:
            told = pb.GenerateStreamChunk(
                token_ids=chunk.ids,
                completion_tokens=len(chunk.ids),
                output_logprobs=_output_logprobs(chunk.ids, chunk.scores),
                input_logprobs=self.prompt if first else None,
                index=self._index,
                **counts,
            )
            yield pb.GenerateResponse(chunk=told)
        if chunk.finish_reason is not None:
            complete = pb.GenerateComplete(
                output_ids=self._ids,
                finish_reason=_FINISH_REASONS[chunk.finish_reason],
                completion_tokens=len(self._ids),
                output_logprobs=_output_logprobs(self._ids, self._scores),
                input_logprobs=self.prompt,
                index=self._index,
                spec_accepted_tokens=chunk.statistics.accepted,
                spec_draft_tokens=chunk.statistics.drafted,
                **counts,
            )
            if isinstance(chunk.matched, str):
                complete.matched_stop_str = chunk.matched
            elif chunk.matched is not None and chunk.matched not in self._eos:
                complete.matched_token_id = chunk.matched
            yield pb.GenerateResponse(complete=complete)


def input_logprobs(ids: Iterable[int], scores: Iterable[Score]) -> pb.InputLogProbs:
    """Of a prompt, whose first token has none.

    Args:
        ids: all of its tokens.
        scores: of those from the second on.
    """
    told = [_top(score) for score in scores]
    return pb.InputLogProbs(
        token_logprobs=[pb.InputTokenLogProb(), *(pb.InputTokenLogProb(value=score.logprob) for score in scores)],
        token_ids=ids,
        top_logprobs=[pb.TopLogProbs(), *told] if any(score.top for score in scores) else [],
    )


def _output_logprobs(ids: Iterable[int], scores: Iterable[Score]) -> pb.OutputLogProbs | None:
    if not scores:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[score.logprob for score in scores],
        token_ids=ids,
        top_logprobs=[_top(score) for score in scores] if any(score.top for score in scores) else [],
    )


def _top(score: Score) -> pb.TopLogProbs:
    return pb.TopLogProbs(token_ids=[i for i, _ in score.top], values=[value for _, value in score.top])


def _counts(statistics: Statistics) -> dict[str, int]:
    return {"prompt_tokens": statistics.prompt_tokens, "cached_tokens": statistics.cached_tokens}
