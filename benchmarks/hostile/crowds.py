"""Clients that are too many, and too impatient."""

from __future__ import annotations

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from benchmarks.hostile.attack import GENERATE, Attack, Call, Source
from glmjax.worker.protocol import SERVICE


def aborts(source: Source) -> Attack:
    """Of ids that are not there, and of one that is, many times."""
    rng, name = source.rng, f"victim-{source.rng.random()}"
    ids = rng.choice(([""], ["x" * 100_000], [str(n) for n in range(5000)], ["nobody"], ["\0", "é"]))
    abort = pb.AbortRequest(request_ids=[*ids, name, name]).SerializeToString()
    aborts = (Call(f"/{SERVICE}/Abort", abort),) * rng.randint(1, 5)
    return Attack("aborts", (Call(GENERATE, source.endless(name)), *aborts))


def same_id(source: Source) -> Attack:
    """Requests that share an id."""
    name = source.rng.choice(("same", "", "\0", "é" * 200))
    message = source.request()
    message.request_id = name
    return Attack("same id", (Call(GENERATE, message.SerializeToString()),) * 3)


def cancelled(source: Source) -> Attack:
    """Streams of which nobody reads the rest."""
    reads = source.rng.choice((0, 0, 1, 3))
    return Attack("cancelled", tuple(Call(GENERATE, source.endless(), reads=reads) for _ in range(4)))


def deadlines(source: Source) -> Attack:
    """Calls that have no time."""
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


def floods(source: Source) -> Attack:
    """More than wait at a time."""
    count = source.rng.choice((20, 60))
    return Attack("floods", tuple(Call(GENERATE, source.request().SerializeToString()) for _ in range(count)))


def slow_readers(source: Source) -> Attack:
    """Streams of which nobody reads for a while."""
    calls = tuple(Call(GENERATE, source.endless(), reads=1) for _ in range(source.rng.choice((4, 12))))
    return Attack("slow readers", calls, hold=source.patience)


def closed_channels(source: Source) -> Attack:
    """A channel that is closed under its calls."""
    reads = source.rng.choice((0, 1))
    calls = tuple(Call(GENERATE, source.endless(), reads=reads) for _ in range(4))
    return Attack("closed channels", calls, hold=source.rng.choice((0.0, 0.02)), closes=True)
