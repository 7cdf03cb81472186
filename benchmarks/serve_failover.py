"""``python -m benchmarks.serve_failover``: two workers behind the real gateway, under load while they are killed, begun anew, ended.

Clients ask one request after another, streamed and not, with OpenAI's package and no retries of its own. Every answer is
compared with what the same request got while nobody else was there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence

import tyro

from benchmarks.measure import machine
from benchmarks.serve.served import Served, children, served
from benchmarks.serve.targets import Gateway, Seen, outcomes
from benchmarks.serve.workload import Asked, workload
from benchmarks.serve_load import closed_loop
from glmjax.fleet.gateway import healthy_workers
from glmjax.nano import NANO

_SETTLED = 3.0
"""Seconds of load before something happens, and after it is over."""
_PATIENCE = 300.0


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What clients notice when workers are killed, begun anew one after another, and ended.

    Attributes:
        kills: of a worker, one after another.
        clients: that ask at a time.
        requests: that there are, asked again and again.
        context: most tokens of a sequence.
        seed: of everything.
    """

    kills: int = 3
    clients: int = 6
    requests: int = 60
    context: int = 512
    seed: int = 0


class Load:
    """Clients that ask one request after another.

    Args:
        gateway: whom.
        asked: requests, with what each got alone.
        clients: at a time.

    Attributes:
        seen: how requests went, beside the same alone, in the order in which they ended.
    """

    def __init__(self, gateway: Gateway, asked: Sequence[tuple[Asked, Seen]], clients: int):
        self._gateway, self._asked, self._clients = gateway, asked, clients
        self._next, self._going = 0, True
        self.seen: list[tuple[Seen, Seen]] = []

    async def during[T](self, happening: Awaitable[T]) -> T:
        """While something happens; what comes of it."""
        asking = [asyncio.create_task(self._client()) for _ in range(self._clients)]
        result = await happening
        self._going = False
        await asyncio.gather(*asking)
        return result

    def described(self, sent: Callable[[Seen], bool] = lambda one: True) -> str:
        """What became of requests, in words.

        Args:
            sent: which of them.
        """
        mine = [pair for pair in self.seen if sent(pair[0])]
        return outcomes(*([*zip(*mine, strict=True)] or ((), ())))

    def longest(self) -> float:
        """Seconds that the slowest request took which was answered."""
        return max(one.whole for one, _ in self.seen if one.answer is not None)

    async def _client(self) -> None:
        while self._going:
            asked, alone = self._asked[self._next % len(self._asked)]
            self._next += 1
            one = await self._gateway.ask(asked, time.monotonic())
            self.seen.append((one, alone))
            if one.failure and not one.times:
                await asyncio.sleep(0.01)  # nobody there: other clients would also look again before long


async def run(arguments: Arguments, fleet: Served) -> str:
    """Ask meanwhile; the report.

    Args:
        arguments: how much.
        fleet: two workers and a gateway.
    """
    gateway = Gateway(fleet.url, NANO.name)
    asked = workload(arguments.requests, longest=(1000, 100), seed=arguments.seed)
    alone = await closed_loop(gateway, [one._replace(stream=False) for one in asked], 1, "alone")
    both = list(zip(asked, alone, strict=True))

    def load() -> Load:
        return Load(gateway, both, arguments.clients)

    lines = []
    for _ in range(arguments.kills):
        killed = load()
        seconds = await killed.during(_kill(fleet))
        lines.append(f"kill -9 of one of two workers: both serve again after {seconds:.1f} s")
        lines.append(f"    {killed.described()}; the slowest took {killed.longest():.1f} s")
    rolled = load()
    seconds = await rolled.during(_roll(fleet))
    lines.append(f"SIGHUP, both begin anew in turn: {seconds:.1f} s")
    lines.append(f"    {rolled.described()}; the slowest took {rolled.longest():.1f} s")
    ended = load()
    asked_at, seconds, status = await ended.during(_end(fleet))
    lines.append(f"SIGTERM: all have ended after {seconds:.1f} s with status {status}")
    lines.append(f"    asked before: {ended.described(lambda one: one.due <= asked_at)}")
    lines.append(f"    asked afterwards: {ended.described(lambda one: one.due > asked_at)}")
    await gateway.close()
    return "\n".join(lines)


async def _kill(fleet: Served) -> float:
    """Kill the older worker; seconds until both serve again."""
    await asyncio.sleep(_SETTLED)
    before = children(fleet.process.pid)
    began = time.monotonic()
    os.kill(before[0], signal.SIGKILL)
    await _new(fleet, before, 1)
    seconds = time.monotonic() - began
    await asyncio.sleep(_SETTLED)
    return seconds


async def _roll(fleet: Served) -> float:
    """Begin both anew, one after the other; seconds that it takes."""
    await asyncio.sleep(_SETTLED)
    before = children(fleet.process.pid)
    began = time.monotonic()
    fleet.process.send_signal(signal.SIGHUP)
    await _new(fleet, before, 2)
    seconds = time.monotonic() - began
    await asyncio.sleep(_SETTLED)
    return seconds


async def _end(fleet: Served) -> tuple[float, float, int]:
    """End everything: when that was asked, seconds that it took, the exit status."""
    await asyncio.sleep(_SETTLED)
    began = time.monotonic()
    fleet.process.send_signal(signal.SIGTERM)
    status = await asyncio.to_thread(fleet.process.wait, _PATIENCE)
    return began, time.monotonic() - began, status


async def _new(fleet: Served, before: Sequence[int], count: int) -> None:
    """Wait until so many workers serve that were not there, and the gateway knows of both."""
    end = time.monotonic() + _PATIENCE
    while len({*children(fleet.process.pid)} - {*before}) < count or (
        len(await asyncio.to_thread(healthy_workers, fleet.url)) < 2
    ):
        if time.monotonic() > end:
            raise TimeoutError(f"the workers do not come back:\n{fleet.log.read_text()}")
        await asyncio.sleep(0.05)


def main(arguments: Arguments) -> None:
    """Start workers and gateway, measure, print."""
    flags = ["--context-length", arguments.context, "--max-running-requests", 4, "--chunked-prefill-size", 128]
    with served(flags, replicas=2, gateway=True) as fleet:
        print(asyncio.run(run(arguments, fleet)))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.serve_failover"))
