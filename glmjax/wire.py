"""Sampling parameters as messages of vLLM's protocol, and back: for the worker and for clients, without JAX.

proto3 does not tell a field that is 0 from one that was not set, so zeros mean what they do in vLLM's servicer: the default,
where 0 makes no sense.
"""

from __future__ import annotations

import json

from smg_grpc_proto import vllm_engine_pb2 as pb

from glmjax.model.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_STOPS, MAX_STOP_LENGTH = 64, 1024
"""Stop strings of a request, and characters of each: every token's text is compared with all of them."""
MAX_TOKENS_NAMED = 2**18
"""Token ids in a field: more than any vocabulary has, so who gives more names some of them twice."""
_NO_SEED = -1
"""What vLLM takes for no seed."""


def sampling_params_of(given: pb.SamplingParams) -> SamplingParams:
    """How to sample and when to stop, as vLLM's servicer understands it.

    Raises:
        ValueError: too many stop strings, tokens or logprobs.
    """
    for name in ("stop_token_ids", "logit_bias"):
        if (count := len(getattr(given, name))) > MAX_TOKENS_NAMED:
            raise ValueError(f"{name} has {count} tokens; give each once, at most {MAX_TOKENS_NAMED}")
    if len(given.stop) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in given.stop):
        raise ValueError(
            f"stop has {len(given.stop)} strings of up to {max(map(len, given.stop))} characters; give at most "
            f"{MAX_STOPS} of {MAX_STOP_LENGTH}"
        )
    return SamplingParams(
        max_new_tokens=given.max_tokens if given.HasField("max_tokens") else None,
        min_new_tokens=given.min_tokens,
        temperature=given.temperature if given.HasField("temperature") else 1.0,
        top_k=given.top_k,
        top_p=given.top_p or 1.0,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty or 1.0,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        logit_bias=dict(given.logit_bias),
        seed=given.seed % 2**32 if given.HasField("seed") and given.seed != _NO_SEED else None,
        logprobs=_logprobs(given, "logprobs"),
        prompt_logprobs=_logprobs(given, "prompt_logprobs"),
        stop=tuple(given.stop),
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        include_stop_str_in_output=given.include_stop_str_in_output,
        skip_special_tokens=given.skip_special_tokens,
        grammar_from_first_token=given.grammar_from_first_token,
        **_constraint(given),
    )


def message_of(params: SamplingParams, n: int = 1) -> pb.SamplingParams:
    """The message that `sampling_params_of` understands as these parameters.

    Args:
        params: how to sample and when to stop.
        n: sequences.

    Raises:
        ValueError: a number that the message has no room for.
    """
    schema, seed = params.json_schema, params.seed
    if seed is not None and (seed := (seed + 2**31) % 2**32 - 2**31) == _NO_SEED:
        raise ValueError(f"seed {params.seed} cannot be told: {_NO_SEED} means none; take another")
    return pb.SamplingParams(
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias,
        seed=seed,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        grammar_from_first_token=params.grammar_from_first_token,
        json_schema=schema if schema is None or isinstance(schema, str) else json.dumps(dict(schema)),
        regex=params.regex,
        grammar=params.grammar,
        structural_tag=params.structural_tag,
        choice=None if params.choice is None else pb.ChoiceConstraint(choices=params.choice),
        n=n,
    )


def _constraint(given: pb.SamplingParams) -> dict[str, str | tuple[str, ...]]:
    kind = given.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not given.json_object):
        return {}
    if kind == "json_object":
        return {"json_schema": '{"type": "object"}'}
    if kind == "choice":
        return {"choice": tuple(given.choice.choices)}
    return {kind: getattr(given, kind)}


def _logprobs(given: pb.SamplingParams, name: str) -> int | None:
    """Alternatives that a field asks for; None where it is not set."""
    if not given.HasField(name):
        return None
    if not 0 <= (asked := getattr(given, name)) <= MAX_LOGPROBS:
        raise ValueError(f"{name} {asked} is outside 0..{MAX_LOGPROBS}; ask for at most {MAX_LOGPROBS} alternatives")
    return asked
