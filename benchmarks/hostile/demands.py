"""Messages that ask for what cannot be."""

from __future__ import annotations

import random
from collections.abc import Callable

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from smg_grpc_proto import vllm_engine_pb2 as pb

from benchmarks.hostile import constraints
from benchmarks.hostile.attack import GENERATE, SECONDS, Attack, Call, Source


def fields(source: Source) -> Attack:
    """Several at once, each with a value that its type has room for."""
    request = source.request()
    _fill(request.sampling_params, source.rng, source.rng.choice((0.05, 0.2)))
    if source.rng.random() < 0.2:
        _fill(request, source.rng, 0.1)
    return Attack("fields", (Call(GENERATE, request.SerializeToString()),))


def _fill(message: Message, rng: random.Random, share: float) -> None:
    """Give so many of a message's fields odd values, and those of the messages in it."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > share:
            continue
        if field.message_type is None:
            values = _BYTES if field.type == FieldDescriptor.TYPE_BYTES else _ODD[field.cpp_type]
            if field.is_repeated:
                getattr(message, field.name).extend(rng.choices(values, k=rng.choice((1, 3, 100))))
            else:
                setattr(message, field.name, rng.choice(values))
        elif field.message_type.GetOptions().map_entry:
            if field.name == "logit_bias":
                message.logit_bias[rng.choice(_ODD[FieldDescriptor.CPPTYPE_INT32])] = rng.choice(_FLOATS)
        else:
            inner = getattr(message, field.name)
            _fill(inner.add() if field.is_repeated else inner, rng, share)


_BYTES = (b"", b"\0\xff", b"x" * 2000)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-45, 3e38, float("nan"), float("inf"), -float("inf"))
_ODD = {
    FieldDescriptor.CPPTYPE_BOOL: (True,),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2),
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
    FieldDescriptor.CPPTYPE_INT32: (0, 1, 2, 20, 21, 100, -1, -2, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2, 100, 128, 129, 2**31 - 1, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**64 - 1),
    FieldDescriptor.CPPTYPE_STRING: ("", "x", "\0", "é😀", "{}", "a*", "<think>", 'start: "a"', "y" * 2000),
}


def parameters(source: Source) -> Attack:
    """Lists that are too long, numbers that do not go together, and what this worker does not do."""
    rng = source.rng
    request = source.request()
    sampling = request.sampling_params
    match rng.randrange(6):
        case 0:
            sampling.logit_bias.update(dict.fromkeys(range(rng.choice((300, source.vocab, 10_000))), 1e30))
        case 1:
            sampling.stop.extend(rng.choice((["x"] * 5000, [""], ["y" * 100_000], ["\0"], ["a"] * 64, ["😀" * 1024])))
        case 2:
            sampling.stop_token_ids.extend(rng.choice(([source.vocab], list(range(source.vocab)), [5] * 10_000)))
        case 3:
            sampling.n, sampling.prompt_logprobs, sampling.logprobs = rng.choice((2, 64, 128, 129)), 20, 20
            sampling.max_tokens = 2
        case 4:
            sampling.min_tokens, sampling.max_tokens = sampling.max_tokens + 1, sampling.max_tokens
        case _:
            _unserved(request, rng)
    return Attack("parameters", (Call(GENERATE, request.SerializeToString()),))


def _unserved(request: pb.GenerateRequest, rng: random.Random) -> None:
    match rng.randrange(5):
        case 0:
            request.data_parallel_rank = rng.choice((-1, 1, 2**31 - 1))
        case 1:
            request.kv_transfer_params.remote_port = 2**32 - 1
        case 2:
            request.kv_transfer_params_json = "{" * 1000
        case 3:
            request.mm_inputs.pixel_values.shape.extend([2**32 - 1] * 8)
        case _:
            request.media_refs.items.add(url="file:///dev/zero")


def prompts(source: Source) -> Attack:
    """Empty, too long, of tokens that are not there, and texts of odd characters."""
    rng, request = source.rng, source.request()
    ids, texts = _odd_ids(source), _odd_texts(source)
    if rng.random() < 0.5:
        request.tokenized.input_ids[:] = rng.choice(ids)()
    else:
        request.text = rng.choice(texts)()
    if rng.random() < 0.3:
        request.sampling_params.truncate_prompt_tokens = rng.choice((-1, 1, source.context, 2**31 - 1))
    if rng.random() < 0.2:
        request.sampling_params.prompt_logprobs = 20
    return Attack("prompts", (Call(GENERATE, request.SerializeToString()),))


def _odd_ids(source: Source) -> tuple[Callable[[], list[int]], ...]:
    return (
        lambda: [],
        lambda: [source.vocab],
        lambda: [2**32 - 1],
        lambda: [2**31] * 3,
        lambda: [1] * 100_000,
        lambda: [1] * (source.context - 1),
        lambda: [1] * source.context,
        lambda: list(range(source.vocab))[-50:],
    )


def _odd_texts(source: Source) -> tuple[Callable[[], str], ...]:
    return (
        lambda: "",
        lambda: "\0" * 50,
        lambda: "x" * 5_000_000,
        lambda: "a" * 30 * source.context,
        lambda: " \n\t" * 5 * source.context,
        lambda: "😀" * source.context,
        lambda: "\u202e\ufeff\ufffd\U0010ffff",
        lambda: "e" + "\u0301" * 500,
        lambda: "[gMASK]<sop><|user|>\n<|endoftext|><think></think><|assistant|>" * 3,
        lambda: "\\ud800\\udc00 \\x00",
    )


def grammars(source: Source) -> Attack:
    """Grammars, schemas and tags that are none, or deeper than anybody needs."""
    rng, request = source.rng, source.request()
    sampling, depth = request.sampling_params, rng.choice([n for n in (10, 100, 1000, 10_000) if n <= source.depth])
    match rng.randrange(5):
        case 0:
            sampling.json_schema = rng.choice(constraints.schemas(depth))
        case 1:
            sampling.regex = rng.choice(constraints.regexes(depth))
        case 2:
            sampling.grammar = rng.choice(constraints.grammars(depth))
        case 3:
            sampling.structural_tag = rng.choice(constraints.structural_tags(depth))
        case _:
            sampling.choice.choices.extend(rng.choice(([], [""], ["a"] * depth, ["a" * 10 * depth], ["\0", "😀"])))
    if rng.random() < 0.3:
        request.text = "<think>"
        sampling.grammar_from_first_token = rng.random() < 0.5
    return Attack("grammars", (Call(GENERATE, request.SerializeToString(), 2 * SECONDS),))
