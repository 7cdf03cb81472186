"""``python -m benchmarks.serve_anomalies``: two workers behind the real gateway, one of which finds its outputs garbled.

What is injected is the finding: on one worker every answer that is long enough is taken for garbled, as if a race had spoilt
its pages. From there on everything is real: what nobody has seen is begun anew and then sent to another worker; a stream
that has begun ends with an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.measure import machine
from benchmarks.serve.served import free_ports, served, serving
from benchmarks.serve.targets import Gateway, Worker, outcomes
from benchmarks.serve.workload import workload
from benchmarks.serve_load import closed_loop
from glmjax.fleet.gateway import command, healthy_workers
from glmjax.nano import NANO
from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine
from glmjax.worker import lifecycle
from glmjax.worker.arguments import Arguments as WorkerArguments

WINDOW = 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Requests through the gateway to two workers, one with anomalies: what becomes of them.

    Attributes:
        requests: of each kind.
        clients: at a time.
        longest: tokens of an answer from which on it is taken for garbled, on one of the workers.
        context: most tokens of a sequence.
        seed: of everything.
    """

    requests: int = 150
    clients: int = 6
    longest: int = 40
    context: int = 512
    seed: int = 0


def garbling(config: EngineConfig, longest: int) -> EngineConfig:
    """An engine's configuration under which every answer of more than so many tokens is taken for garbled."""
    never_enough = float(config.num_draft + 2)
    rules = AnomalyRules(shortest_length=never_enough, least_tokens=longest, window=WINDOW, confirm=False)
    return dataclasses.replace(config, anomalies=rules, adapts_draft=False)


def garbling_worker(arguments: WorkerArguments, longest: int) -> None:
    """Be such a worker, in a process of its own."""

    def make() -> Engine:
        glm = arguments.model()
        return Engine(glm, garbling(arguments.engine(glm, on_gpu=False), longest))

    async def main() -> None:
        await lifecycle.Worker(arguments, make).run()

    asyncio.run(main())


async def run(arguments: Arguments, good: str, garbling: str, url: str, manifest: Path) -> str:
    """Ask; the report.

    Args:
        arguments: how much.
        good: address of a worker.
        garbling: address of the other.
        url: of the gateway.
        manifest: where it finds its workers.
    """
    asked = workload(arguments.requests, longest=(1000, 100), seed=arguments.seed)
    long = sum(one.new_tokens > arguments.longest for one in asked)
    gateway, workers = Gateway(url, NANO.name), [Worker(good), Worker(garbling)]
    await _sends_to(url, manifest, good)
    alone = await closed_loop(gateway, [one._replace(stream=False) for one in asked], 1, "alone")
    await workers[0].flush()
    await _sends_to(url, manifest, good, garbling)
    lines = [f"{len(asked)} requests of each kind, {long} of them with more than {arguments.longest} new tokens", ""]
    for stream in (False, True):
        mine = [one._replace(stream=stream) for one in asked]
        seen = await closed_loop(gateway, mine, arguments.clients, "streamed" if stream else "whole")
        lines.append(f"{'streamed' if stream else 'whole'}: {outcomes(seen, alone)}")
        for worker in workers:
            await worker.flush()
    for target in (gateway, *workers):
        await target.close()
    return "\n".join(lines)


async def _sends_to(url: str, manifest: Path, *addresses: str) -> None:
    new = manifest.with_suffix(".new")
    new.write_text(json.dumps({"version": 1, "workers": [{"url": f"grpc://{address}"} for address in addresses]}))
    new.replace(manifest)
    while len(await asyncio.to_thread(healthy_workers, url)) != len(addresses):
        await asyncio.sleep(0.1)


def main(arguments: Arguments) -> None:
    """Start two workers and a gateway, measure, print."""
    sizes = {"context_length": arguments.context, "max_running_requests": 4, "chunked_prefill_size": 128}
    for holdback in (0, 32):
        flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        flags += ["--speculative-num-draft-tokens", "1", "--log-level", "error", "--stream-holdback", str(holdback)]
        with tempfile.TemporaryDirectory() as folder, served(flags) as good:
            manifest = Path(folder) / "workers.json"
            manifest.write_text('{"version": 1, "workers": []}')
            given = WorkerArguments(
                port=free_ports(4), log_level="error", speculative_num_draft_tokens=1, stream_holdback=holdback, **sizes
            )
            behind = dataclasses.replace(given, gateway_port=given.port + 1, metrics_port=given.port + 2)
            gateway = subprocess.Popen(
                [sys.executable, "-m", "smg", *command(behind, manifest)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            garbling = multiprocessing.get_context("spawn").Process(
                target=garbling_worker, args=(given, arguments.longest), daemon=True
            )
            garbling.start()
            try:
                while not serving(f"127.0.0.1:{given.port}"):
                    if not garbling.is_alive():
                        raise RuntimeError("the worker with anomalies does not serve")
                    time.sleep(0.1)
                url = f"http://127.0.0.1:{behind.gateway_port}"
                print(f"\n--stream-holdback {holdback}")
                print(asyncio.run(run(arguments, good.address, f"127.0.0.1:{given.port}", url, manifest)))
            finally:
                gateway.terminate()
                garbling.terminate()
                gateway.wait()
                garbling.join()
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.serve_anomalies"))
