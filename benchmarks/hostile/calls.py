"""Calls other than Generate, with odd arguments."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from benchmarks.hostile.attack import SECONDS, Attack, Call, Source
from glmjax.worker.protocol import SERVICE


def other_calls(source: Source) -> Attack:
    """Of the service, with numbers that make no sense."""
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


def health_and_reflection(source: Source) -> Attack:
    """Of the services that come with gRPC, about names that are not there."""
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


def profiles(source: Source) -> Attack:
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
    begun = Call(f"/{SERVICE}/StartProfile", start.SerializeToString(), rng.choice((0.001, 0.02, SECONDS)))
    return Attack("profiles", (stop, begun, stop), at_once=rng.random() < 0.3)
