"""Requests that no honest client sends: fuzzed, absurd, enormous, too many at once. Drawn by a seeded generator."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from benchmarks.hostile_connections import beginnings, sequences
from benchmarks.hostile_grammars import grammars, regexes, schemas, structural_tags
from glmjax.worker.protocol import SERVICE

GENERATE = f"/{SERVICE}/Generate"
_SECONDS = 20.0
_OVERSIZED = (16 << 20) + 1
_SAFE = ("Generate", "Embed", "HealthCheck", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads", "GetTokenizer")
"""Methods that may be sent anything: whatever it is read as, nothing is written anywhere."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as it goes over the wire.

    Attributes:
        path: of the method.
        message: bytes that need not be one.
        seconds: its deadline.
        reads: messages after which the client reads no more; None to read all.
        metadata: headers.
    """

    path: str
    message: bytes
    seconds: float = _SECONDS
    reads: int | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = ()


@dataclasses.dataclass(frozen=True)
class Attack:
    """Calls and connections that belong together.

    Attributes:
        kind: in the report.
        calls: to make.
        knocks: what is sent on connections that are not gRPC's.
        at_once: begin all calls before any is read; otherwise one ends before the next.
        hold: seconds that knocks, and calls that are not read to their end, stay open.
        closes: the calls have a channel of their own, which is closed while they are under way.
    """

    kind: str
    calls: tuple[Call, ...] = ()
    knocks: tuple[bytes, ...] = ()
    at_once: bool = True
    hold: float = 0.0
    closes: bool = False

    def __len__(self) -> int:
        return len(self.calls) + len(self.knocks)


@dataclasses.dataclass(frozen=True)
class Source:
    """What attacks are drawn from.

    Attributes:
        rng: whose seed fixes them.
        vocab: V of the model.
        context: most tokens of a sequence.
        folder: for traces; nothing is written elsewhere.
        patience: seconds that slow clients take.
        depth: of the deepest grammars.
    """

    rng: random.Random
    vocab: int
    context: int
    folder: Path
    patience: float = 2.0
    depth: int = 10_000

    def request(self, length: int = 12, **sampling: object) -> pb.GenerateRequest:
        """A valid one, unless `sampling` is not."""
        ids = [self.rng.randrange(self.vocab) for _ in range(self.rng.randint(1, length))]
        fields = {"max_tokens": self.rng.randint(1, 8), "seed": self.rng.randrange(1 << 30)} | sampling
        return pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=pb.SamplingParams(**fields),
            stream=self.rng.random() < 0.5,
        )

    def endless(self, name: str = "") -> bytes:
        """A long stream of large messages."""
        request = self.request(max_tokens=self.context, ignore_eos=True, logprobs=20)
        request.stream, request.request_id = True, name
        return request.SerializeToString()


def attacks(source: Source, requests: int) -> Iterator[Attack]:
    """So many requests; two of them are larger than a worker takes.

    Args:
        source: what they are drawn from.
        requests: calls and connections in all.
    """
    kinds, weights = zip(*_WEIGHTS.items(), strict=True)
    left, attack = requests, Attack("oversized", (Call(GENERATE, bytes(_OVERSIZED)),) * 2, at_once=False)
    while left > 0:
        attack = dataclasses.replace(attack, calls=attack.calls[:left], knocks=attack.knocks[:left])
        yield attack
        left -= len(attack)
        attack = source.rng.choices(kinds, weights)[0](source)


# Messages that are none


def _random_bytes(source: Source) -> Attack:
    path = f"/{SERVICE}/{source.rng.choice(_SAFE)}"
    return Attack("random bytes", (Call(path, source.rng.randbytes(source.rng.choice((0, 1, 2, 10, 100, 10_000)))),))


def _mutated(source: Source) -> Attack:
    """A valid request with some bytes changed, left out, put in, cut off or doubled."""
    rng = source.rng
    request = source.request(temperature=0.7, stop=["x", "yz"], logit_bias={1: 1.0}, json_schema='{"type": "object"}')
    message = bytearray(request.SerializeToString())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(message)) if message else 0
        match rng.randrange(5):
            case 0 if message:
                message[at] ^= 1 << rng.randrange(8)
            case 1:
                del message[at : at + rng.randint(1, 4)]
            case 2:
                message[at:at] = rng.randbytes(rng.randint(1, 4))
            case 3:
                del message[at:]
            case _:
                message += message[at:]
    return Attack("mutated", (Call(GENERATE, bytes(message)),))


def _bad_text(source: Source) -> Attack:
    """Strings that are not UTF-8, in a field of every depth."""
    bad = source.rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"a\xf4\x90\x80\x80", b"\xe2\x82"))
    text = bytes([source.rng.choice((0x1A, 0x0A)), len(bad)]) + bad  # text, request_id
    regex = b"\x8a\x01" + bytes([len(bad)]) + bad
    nested = b"\x1a\x01x" + b"\x22" + bytes([len(regex)]) + regex  # sampling_params.regex
    return Attack("bad UTF-8", (Call(GENERATE, source.rng.choice((text, nested))),))


def _methods(source: Source) -> Attack:
    odd = (f"/{SERVICE}/Nothing", f"/{SERVICE}/", f"{GENERATE}/", f"/{'a' * 4000}/b")
    paths = ("/", "/x/y/z", "/\xe4/b", GENERATE, *odd)
    calls = (
        Call(source.rng.choice(paths), source.request().SerializeToString()),
        Call(f"/{SERVICE}/{source.rng.choice(_SAFE)}", source.request().SerializeToString()),
    )
    return Attack("methods", calls)


def _metadata(source: Source) -> Attack:
    odd = (
        (("x", "y" * 7000),),
        (("x", "y" * 100_000),),
        tuple((f"x{n}", "y") for n in range(300)),
        (("traceparent", "00-zz-zz-zz"),),
        (("traceparent", f"00-{'0' * 32}-{'0' * 16}-ff"), ("tracestate", "=,=,")),
        (("x-bin", b"\x00\xff\xfe"),),
        (("authorization", "Bearer "), ("authorization", "Basic \x7e")),
    )
    return Attack("metadata", (Call(GENERATE, source.request().SerializeToString(), metadata=source.rng.choice(odd)),))


# Messages that ask for what cannot be


def _fields(source: Source) -> Attack:
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


def _parameters(source: Source) -> Attack:
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


def _prompts(source: Source) -> Attack:
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


def _grammars(source: Source) -> Attack:
    rng, request = source.rng, source.request()
    sampling, depth = request.sampling_params, rng.choice([n for n in (10, 100, 1000, 10_000) if n <= source.depth])
    match rng.randrange(5):
        case 0:
            sampling.json_schema = rng.choice(schemas(depth))
        case 1:
            sampling.regex = rng.choice(regexes(depth))
        case 2:
            sampling.grammar = rng.choice(grammars(depth))
        case 3:
            sampling.structural_tag = rng.choice(structural_tags(depth))
        case _:
            sampling.choice.choices.extend(rng.choice(([], [""], ["a"] * depth, ["a" * 10 * depth], ["\0", "😀"])))
    if rng.random() < 0.3:
        request.text = "<think>"
        sampling.grammar_from_first_token = rng.random() < 0.5
    return Attack("grammars", (Call(GENERATE, request.SerializeToString(), 2 * _SECONDS),))


# Too many, and too impatient


def _aborts(source: Source) -> Attack:
    """Of ids that are not there, and of one that is, many times."""
    rng, name = source.rng, f"victim-{source.rng.random()}"
    ids = rng.choice(([""], ["x" * 100_000], [str(n) for n in range(5000)], ["nobody"], ["\0", "é"]))
    abort = pb.AbortRequest(request_ids=[*ids, name, name]).SerializeToString()
    aborts = (Call(f"/{SERVICE}/Abort", abort),) * rng.randint(1, 5)
    return Attack("aborts", (Call(GENERATE, source.endless(name)), *aborts))


def _same_id(source: Source) -> Attack:
    name = source.rng.choice(("same", "", "\0", "é" * 200))
    message = source.request()
    message.request_id = name
    return Attack("same id", (Call(GENERATE, message.SerializeToString()),) * 3)


def _cancelled(source: Source) -> Attack:
    reads = source.rng.choice((0, 0, 1, 3))
    return Attack("cancelled", tuple(Call(GENERATE, source.endless(), reads=reads) for _ in range(4)))


def _deadlines(source: Source) -> Attack:
    seconds = source.rng.choice((0.0, 0.001, 0.01, 0.05))
    others = tuple(
        Call(f"/{SERVICE}/{name}", message.SerializeToString(), seconds)
        for name, message in (
            ("FlushCache", common_pb2.FlushCacheRequest(timeout_s=5)),
            ("GetTokenizer", common_pb2.GetTokenizerRequest()),
            ("SubscribeKvEvents", common_pb2.SubscribeKvEventsRequest()),
        )
    )
    return Attack("deadlines", (*(Call(GENERATE, source.endless(), seconds) for _ in range(4)), *others))


def _floods(source: Source) -> Attack:
    """More than wait at a time."""
    count = source.rng.choice((20, 60))
    return Attack("floods", tuple(Call(GENERATE, source.request().SerializeToString()) for _ in range(count)))


def _slow_readers(source: Source) -> Attack:
    calls = tuple(Call(GENERATE, source.endless(), reads=1) for _ in range(source.rng.choice((4, 12))))
    return Attack("slow readers", calls, hold=source.patience)


def _closed_channels(source: Source) -> Attack:
    reads = source.rng.choice((0, 1))
    calls = tuple(Call(GENERATE, source.endless(), reads=reads) for _ in range(4))
    return Attack("closed channels", calls, hold=source.rng.choice((0.0, 0.02)), closes=True)


# Connections


def _sockets(source: Source) -> Attack:
    knocks = tuple(source.rng.choices(beginnings(source.rng), k=8))
    return Attack("sockets", knocks=knocks, hold=source.patience)


def _http2(source: Source) -> Attack:
    told = sequences(source.rng, GENERATE, source.request().SerializeToString())
    return Attack("HTTP/2", knocks=tuple(source.rng.choices(told, k=4)), hold=source.patience / 2)


# Other calls


def _other_calls(source: Source) -> Attack:
    rng = source.rng
    start = rng.choice((0, 1, 2**63, 2**64 - 1, rng.getrandbits(60)))
    calls = (
        ("Embed", pb.EmbedRequest(tokenized=pb.TokenizedInput(input_ids=[2**32 - 1] * 1000)), None),
        ("GetTokenizer", common_pb2.GetTokenizerRequest(), rng.choice((None, 1))),
        ("SubscribeKvEvents", common_pb2.SubscribeKvEventsRequest(start_sequence_number=start), 1),
        ("FlushCache", common_pb2.FlushCacheRequest(timeout_s=rng.choice((float("nan"), -1.0, 0.0))), None),
        ("FlushCache", common_pb2.FlushCacheRequest(timeout_s=rng.choice((float("inf"), 3e38))), None),
        ("GetLoads", pb.GetLoadsRequest(dp_rank=-(2**31), include=["x" * 1000] * 100), None),
        ("GetServerInfo", pb.GetServerInfoRequest(), None),
        ("HealthCheck", pb.HealthCheckRequest(), None),
    )
    name, message, reads = rng.choice(calls)
    return Attack("other calls", (Call(f"/{SERVICE}/{name}", message.SerializeToString(), 1.0, reads),))


def _health_and_reflection(source: Source) -> Attack:
    rng = source.rng
    name = rng.choice(("", "nobody", "x" * 100_000, "\0", SERVICE))
    asked = health_pb2.HealthCheckRequest(service=name).SerializeToString()
    info = reflection_pb2.ServerReflectionRequest
    extension = reflection_pb2.ExtensionRequest(containing_type=name, extension_number=-1)
    files = info(file_by_filename=name), info(file_containing_symbol=name), info(file_containing_extension=extension)
    told = rng.choice((info(), *files, info(all_extension_numbers_of_type=name), info(list_services=name)))
    calls = (
        Call("/grpc.health.v1.Health/Check", rng.choice((asked, asked[:1]))),
        Call("/grpc.health.v1.Health/Watch", asked, reads=1),
        Call(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            rng.choice((told.SerializeToString(), b"\xff")),
        ),
    )
    return Attack("health, reflection", calls)


def _profiles(source: Source) -> Attack:
    """Traces to odd places, which end at once, or are never begun; and some whose client does not wait."""
    rng, file = source.rng, source.folder / "file"
    file.touch()
    names = ("a", "a/b/c", "file", "file/x", "x" * 300, "é😀", " ", "a\0b", "\n")
    start = common_pb2.StartProfileRequest(
        output_dir=f"{source.folder}/{rng.choice(names)}",
        num_steps=rng.choice((0, 1, -1, 2**31 - 1)),
        start_step=rng.choice((0, 0, 0, -5)),
    )
    stop = Call(f"/{SERVICE}/StopProfile", common_pb2.StopProfileRequest().SerializeToString())
    begun = Call(f"/{SERVICE}/StartProfile", start.SerializeToString(), rng.choice((0.001, 0.02, _SECONDS)))
    return Attack("profiles", (stop, begun, stop), at_once=rng.random() < 0.3)


_WEIGHTS: dict[Callable[[Source], Attack], float] = {
    _random_bytes: 8,
    _mutated: 10,
    _bad_text: 4,
    _methods: 4,
    _metadata: 4,
    _fields: 25,
    _parameters: 10,
    _prompts: 10,
    _grammars: 20,
    _aborts: 2,
    _same_id: 2,
    _cancelled: 3,
    _deadlines: 3,
    _floods: 1,
    _slow_readers: 1,
    _closed_channels: 2,
    _sockets: 1,
    _http2: 2,
    _other_calls: 8,
    _health_and_reflection: 4,
    _profiles: 0.3,
}
"""How often each is drawn. Those of many calls are drawn less often, and so are traces, which slow everything down."""
