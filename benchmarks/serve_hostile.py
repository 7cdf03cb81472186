"""``python -m benchmarks.serve_hostile``: a worker among clients that are broken or hostile, and two that are not.

Malformed, absurd and enormous requests, floods, and connections that only stay are drawn by a seeded generator
(`benchmarks.hostile`). All the while two neighbours send valid requests and compare each answer with what the same
request gave while nobody else was there. In the end nothing may be left of it: no request, page, connection or thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import tyro
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from benchmarks.hostile.attack import Attack, Call, Source
from benchmarks.hostile.attacks import attacks
from benchmarks.hostile.report import Neighbour, Process, Report, Tally
from benchmarks.measure import machine
from benchmarks.serve.served import served
from glmjax.nano import NANO

NEIGHBOURS = 2
_CONTEXT, _PAGE = 256, 64
_FLAGS = (
    *("--load-format", "dummy", "--page-size", _PAGE, "--max-running-requests", 2, "--max-queued-requests", 32),
    *("--chunked-prefill-size", 64, "--log-level", "warning"),
)
_SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "intermediate_size": 48, "n_routed_experts": 4},
    **{"moe_intermediate_size": 16, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    **{"mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "shared"], "index_topk": 8},
    **{"index_n_heads": 4, "index_head_dim": 16, "max_position_embeddings": _CONTEXT},
}
_SETTLES = 30.0
_MORE_FILES, _MORE_THREADS = 8, 16
"""Than before that are no leak: the second are those of pools, which begin their threads when there is work."""
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What becomes of a worker that gets malformed and extreme requests, and of the answers to others.

    Attributes:
        requests: malformed or extreme ones, connections among them.
        seed: of the generator that draws them.
        address: host:port of a worker to test; default one of its own, with a small model and random weights.
        clients: hostile ones, at a time.
        patience: seconds that slow clients stay.
        depth: of the deepest grammars.
    """

    requests: int = 10_000
    seed: int = 0
    address: str | None = None
    clients: int = 8
    patience: float = 2.0
    depth: int = 10_000


# Hostile clients


def strike(attack: Attack, address: str, channel: grpc.Channel, add: Callable[..., None]) -> None:
    """Make its calls and connections, and say of each what came of it.

    Args:
        attack: what to do.
        address: of the worker.
        channel: to it.
        add: takes kind, status and words.
    """
    with contextlib.ExitStack() as opened:
        if attack.closes:
            channel = opened.enter_context(grpc.insecure_channel(address, options=_OPTIONS))
        sockets = [_knocked(address, knock) for knock in attack.knocks]
        for calls in [attack.calls] if attack.at_once else [(call,) for call in attack.calls]:
            begun = [(call, _begun(channel, call)) for call in calls]
            ended = {n: _read(handle, call.reads) for n, (call, handle) in enumerate(begun) if call.reads is not None}
            if attack.hold and not sockets:
                time.sleep(attack.hold)
            if attack.closes:
                channel.close()
            for n, (_, handle) in enumerate(begun):
                status, words = ended[n] if n in ended else _read(handle, None)
                handle.cancel()
                add(attack.kind, status, words)
        if sockets:
            time.sleep(attack.hold)
            for knocked in sockets:
                add(attack.kind, _left(knocked))


def _begun(channel: grpc.Channel, call: Call) -> grpc.Call:
    return channel.unary_stream(call.path)(call.message, timeout=call.seconds, metadata=call.metadata)


def _read(call: grpc.Call, messages: int | None) -> tuple[str, str]:
    """Read so many messages, or all; the status, and its words."""
    try:
        for _ in itertools.islice(call, messages):
            pass
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "answered" if messages is None else "left", ""


def _knocked(address: str, data: bytes) -> socket.socket:
    """A connection on which something has been sent, as far as it was taken."""
    host, _, port = address.rpartition(":")
    connection = socket.socket()
    connection.settimeout(10)
    with contextlib.suppress(OSError):
        connection.connect((host, int(port)))
        connection.sendall(data)
    return connection


def _left(connection: socket.socket) -> str:
    """Close it; whether the worker has done so before."""
    connection.setblocking(False)
    with connection:
        try:
            while connection.recv(65536):
                pass
        except BlockingIOError:
            return "held open"
        except OSError:
            return "closed"
        return "closed"


# Neighbours


def valid_requests() -> list[pb.GenerateRequest]:
    """What neighbours ask for: short and longer, whole and streamed, sampled, greedy and under a grammar."""
    prompts = ("give me ", "def area(r):\n    return", "The quick brown fox jumps over the lazy dog. " * 2)
    fields = (
        {"max_tokens": 8, "temperature": 1.0},
        {"max_tokens": 40, "temperature": 0.7, "top_p": 0.9},
        {"max_tokens": 24, "temperature": 0.0, "repetition_penalty": 1.2},
        {"max_tokens": 12, "json_schema": '{"enum": ["red", "blue"]}'},
        {"max_tokens": 10, "n": 2, "logprobs": 2},
    )
    return [
        pb.GenerateRequest(text=prompt, stream=stream, sampling_params=pb.SamplingParams(seed=seed, **more))
        for prompt, seed, stream, more in itertools.product(prompts, (1, 2), (False, True), fields)
    ]


def answered(stub: vllm_engine_pb2_grpc.VllmEngineStub, request: pb.GenerateRequest) -> dict[int, tuple[int, ...]]:
    """Tokens of each of its sequences; of a stream also those of its pieces, where they do not come to the whole.

    Raises:
        grpc.RpcError: there are none.
    """
    streamed: dict[int, list[int]] = {}
    whole: dict[int, tuple[int, ...]] = {}
    for response in stub.Generate(request, timeout=120):
        if response.HasField("chunk"):
            streamed.setdefault(response.chunk.index, []).extend(response.chunk.token_ids)
        else:
            whole[response.complete.index] = tuple(response.complete.output_ids)
    pieces = {index: tuple(ids) for index, ids in streamed.items()}
    if request.stream and pieces != whole:
        return whole | {-1 - index: ids for index, ids in pieces.items()}
    return whole


def neighbour(
    address: str,
    asked: Sequence[tuple[pb.GenerateRequest, dict[int, tuple[int, ...]]]],
    over: threading.Event,
) -> Neighbour:
    """Send valid requests, one after another, until it is over.

    Args:
        address: of the worker.
        asked: requests, and what they should give.
        over: when to end.
    """
    seen = Neighbour()
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        following = itertools.cycle(asked)
        while not over.is_set():
            began = time.monotonic()
            request, expected = next(following)
            try:
                seen.different += answered(stub, request) != expected
                seen.answers += 1
                seen.slowest = max(seen.slowest, time.monotonic() - began)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    seen.refused += 1
                else:
                    seen.failed[f"{error.code().name} ({(error.details() or '')[:100]})"] += 1
                time.sleep(0.05)
    return seen


# The whole


def bombard(
    address: str,
    source: Iterable[Attack],
    *,
    total: int,
    clients: int = 8,
    pid: int | None = None,
    folder: Path | None = None,
    alive: Callable[[], bool] = lambda: True,
    valid: Sequence[pb.GenerateRequest] = (),
) -> Report:
    """Let hostile clients and neighbours at a worker, and look at what is left.

    Args:
        address: of the worker.
        source: what the hostile ones do.
        total: requests in it.
        clients: hostile ones.
        pid: of the worker's process, if it is on this machine and does nothing else.
        folder: for a trace in the end, by which it is seen that there can be one; None to leave it out.
        alive: whether there is a worker; without one nothing more is sent.
        valid: what neighbours ask for; default `valid_requests`.
    """
    began, over = time.monotonic(), threading.Event()
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        asked = [(request, answered(stub, request)) for request in valid or valid_requests()]
        before = None if pid is None else Process.of(pid)
        tally = Tally(total, lambda: None if pid is None else _process(pid))
        with ThreadPoolExecutor(clients) as hostile, ThreadPoolExecutor(NEIGHBOURS) as others:
            orders = [random.Random(n).sample(asked, len(asked)) for n in range(NEIGHBOURS)]
            seen = [others.submit(neighbour, address, order, over) for order in orders]
            try:
                _all(hostile, clients, address, itertools.takewhile(lambda _: alive(), source), tally)
            finally:
                over.set()
        tally.close()
        left = _remains(stub, folder)
        after = None if pid is None else _process(pid)
        if before is not None and after is not None:
            after, grown = _settled(pid, before)
            left += grown
    return Report(tally, tuple(one.result() for one in seen), left, (before, after), time.monotonic() - began)


def source_of(address: str, seed: int, folder: Path, **more: float) -> Source:
    """What attacks on a worker are drawn from.

    Args:
        address: of the worker, which tells the sizes of its model.
        seed: of the generator.
        folder: for traces.
        **more: fields of `Source`.
    """
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        told = vllm_engine_pb2_grpc.VllmEngineStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
    return Source(random.Random(seed), told.vocab_size, told.max_context_length, folder, **more)


def _all(pool: ThreadPoolExecutor, clients: int, address: str, source: Iterable[Attack], tally: Tally) -> None:
    """Everything there is, by so many clients, each of which takes the next when it is done."""
    lock, following = threading.Lock(), iter(source)

    def client() -> None:
        with grpc.insecure_channel(address, options=_OPTIONS) as channel:
            while True:
                with lock:
                    attack = next(following, None)
                if attack is None:
                    return
                strike(attack, address, channel, tally.add)

    for one in [pool.submit(client) for _ in range(clients)]:
        one.result()


def _process(pid: int) -> Process | None:
    with contextlib.suppress(OSError, TypeError):  # it has ended
        return Process.of(pid)
    return None


def _within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _remains(stub: vllm_engine_pb2_grpc.VllmEngineStub, folder: Path | None) -> tuple[str, ...]:
    """What should not be there when all clients are gone."""

    def idle() -> bool:
        [load] = stub.GetLoads(pb.GetLoadsRequest(), timeout=10).loads
        live = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10).active_requests
        return live == load.num_total_reqs == 0

    try:
        if not _within(_SETTLES, idle):
            return (f"after {_SETTLES:.0f} s requests are still under way",)
        found = [*_traces(stub, folder)] if folder is not None else []
        flushed = stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=5), timeout=10)
        [load] = stub.GetLoads(pb.GetLoadsRequest(), timeout=10).loads
        if not flushed.success or load.num_used_tokens:
            found.append(f"{load.num_used_tokens} rows of the cache are in use, flushed: {flushed.message}")
        return tuple(found)
    except grpc.RpcError as error:
        return (f"the worker does not answer: {error.code().name}: {error.details()}",)


def _traces(stub: vllm_engine_pb2_grpc.VllmEngineStub, folder: Path) -> Iterator[str]:
    """Whether a trace can be begun and ended."""
    stub.StopProfile(common_pb2.StopProfileRequest(), timeout=60)
    for call, request in (
        (stub.StartProfile, common_pb2.StartProfileRequest(output_dir=str(folder / "last"))),
        (stub.StopProfile, common_pb2.StopProfileRequest()),
    ):
        told = call(request, timeout=60)
        if not told.success:
            yield f"no trace can be had any more: {told.message}"
            return


def _settled(pid: int, before: Process) -> tuple[Process | None, tuple[str, ...]]:
    """What it has in the end, and what that is too much of."""

    def more() -> list[str]:
        now = _process(pid) or before
        allowed = ("threads", _MORE_THREADS), ("files", _MORE_FILES)
        grown = {name: getattr(now, name) - getattr(before, name) for name, _ in allowed}
        return [f"{grown[name]} more {name} than before" for name, most in allowed if grown[name] > most]

    _within(_SETTLES, lambda: not more())
    return _process(pid), tuple(more())


def small(folder: Path) -> Path:
    """A checkpoint without weights: a few numbers of the shape of the model in the box, and its tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    own = json.loads((NANO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | _SIZES))
    return folder


def errors_of(log: Path) -> str:
    """What a worker's log complains of, the same only once."""
    found = Counter(
        re.findall(r"^\S+ \S+ (?:ERROR|CRITICAL) (.{0,160})", log.read_text(errors="replace"), re.MULTILINE)
    )
    lines = [f"{count:>6} {text}" for text, count in found.most_common(12)]
    return "\n".join([f"errors in the worker's log: {found.total()}", *lines])


def main(arguments: Arguments) -> int:
    """Run and print; the exit status: 1 where anything is wrong."""
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        address, worker = arguments.address, None
        if address is None:
            worker = opened.enter_context(served(["--model-path", str(small(folder)), *map(str, _FLAGS)]))
            address = worker.address
        source = source_of(address, arguments.seed, folder, patience=arguments.patience, depth=arguments.depth)
        report = bombard(
            address,
            attacks(source, arguments.requests),
            total=arguments.requests,
            clients=arguments.clients,
            pid=None if worker is None else worker.process.pid,
            folder=folder,
            alive=lambda: worker is None or worker.process.poll() is None,
        )
        print(report)
        status = None if worker is None else worker.process.poll()
        if worker is not None:
            print(errors_of(worker.log), "the worker is alive" if status is None else f"it ended: {status}", sep="\n")
        print(machine())
        return int(bool(report.unexpected or report.wrong) or status is not None)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="python -m benchmarks.serve_hostile")))
