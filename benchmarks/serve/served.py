"""`python -m glmjax.serve` as a process of its own, for as long as a benchmark wants it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from glmjax.fleet.gateway import healthy_workers
from glmjax.worker.protocol import SERVICE

_SECONDS = 900.0


class Served(NamedTuple):
    """What has been started.

    Attributes:
        process: the one that was started.
        address: of the first worker.
        url: of the gateway; "" without one.
        began: seconds that it took until requests were taken.
        log: what it says.
    """

    process: subprocess.Popen[bytes]
    address: str
    url: str
    began: float
    log: Path


@contextlib.contextmanager
def served(flags: Sequence[str], *, replicas: int = 1, gateway: bool = False) -> Iterator[Served]:
    """Start workers, wait until all take requests, and end them.

    Args:
        flags: of the command line, ports aside.
        replicas: workers.
        gateway: whether one is before them.

    Raises:
        RuntimeError: they do not start; says what they said.
    """
    port = free_ports(2 * replicas + 3)
    address, url = f"127.0.0.1:{port}", f"http://127.0.0.1:{port + 2 * replicas + 2}" if gateway else ""
    several = ["--gateway", "--gateway-port", port + 2 * replicas + 2] if gateway else []
    command = [
        *(sys.executable, "-m", "glmjax.serve", "--port", port, "--metrics-port", port + replicas),
        *("--replicas", replicas, *several, *flags),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log, began = Path(folder) / "log", time.monotonic()
        with open(log, "wb") as file:
            process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file)
        try:
            while not (len(healthy_workers(url)) == replicas if gateway else serving(address)):
                if process.poll() is not None or time.monotonic() - began > _SECONDS:
                    raise RuntimeError(f"{' '.join(map(str, command))} does not serve:\n{log.read_text()}")
                time.sleep(0.1)
            yield Served(process, address, url, time.monotonic() - began, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()


def serving(address: str) -> bool:
    """Whether a worker takes requests."""
    with grpc.insecure_channel(address) as channel:
        try:
            asked = health_pb2.HealthCheckRequest(service=SERVICE)
            told = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=5)
        except grpc.RpcError:
            return False
    return told.status == health_pb2.HealthCheckResponse.SERVING


def children(pid: int) -> list[int]:
    """Workers of a process that has begun several, first the one that began first; the gateway is begun before them.

    Args:
        pid: of the process.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, after = path.read_text().rpartition(")")
            parent, began = int(after.split()[1]), int(after.split()[19])
            if parent == pid and "spawn_main" in (path.parent / "cmdline").read_text():
                found.append((began, int(path.parent.name)))
    return [child for _, child in sorted(found)]


def free_ports(count: int) -> int:
    """The first of some that follow each other."""
    for first in range(21_000, 60_000, 32):
        with contextlib.ExitStack() as bound:
            try:
                for port in range(first, first + count):
                    bound.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise OSError(f"no {count} free ports follow each other; close some")
