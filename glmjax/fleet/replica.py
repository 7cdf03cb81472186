"""One of several workers: a process that is begun again whenever it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from glmjax.fleet.child import Child
from glmjax.worker.arguments import Arguments
from glmjax.worker.lifecycle import Worker

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_LIVED = 60.0
"""Seconds after which a worker has not failed at once."""
REFUSED = 2
"""Exit status of a worker that cannot serve. One that never has would not do better the next time; one that has, may: its
port is taken for a moment, or a disk is away."""


class Replica:
    """A worker that is kept running.

    Args:
        number: which, from 0.
        arguments: its own.
        environment: its own.
        changed: is called whenever it begins or ceases to take requests.

    Attributes:
        address: where it listens, while it takes requests; else None.
    """

    def __init__(self, number: int, arguments: Arguments, environment: Mapping[str, str], changed: Callable[[], None]):
        self.number, self.address = number, None
        self._given, self._changed = (number, arguments, dict(environment)), changed
        self._child: Child | None = None
        self._serving, self._leaving, self._again = asyncio.Event(), asyncio.Event(), False
        self._has_served = False

    async def keep(self) -> int:
        """Begin it, again and again, until it is to leave, or cannot be served; its last exit status."""
        status, pause, loop = 0, _FIRST_PAUSE, asyncio.get_running_loop()
        while not self._leaving.is_set():
            began = loop.time()
            self._child = Child(f"glmjax-worker-{self.number}", serve, *self._given, heard=self._heard)
            status = await self._child.ended()
            self._heard(None)
            if self._leaving.is_set() or (status == REFUSED and not self._has_served):
                return status
            if self._again:
                self._again = False
                continue
            pause = _FIRST_PAUSE if loop.time() - began > _LIVED else min(2 * pause, _LONGEST_PAUSE)
            _LOG.error("worker %d has ended with status %d; beginning again in %.0f s", self.number, status, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), pause)
        return status

    async def serving(self) -> None:
        """Wait until it takes requests."""
        await self._serving.wait()

    async def again(self, seconds: float) -> None:
        """End this process, once nothing is under way or so many seconds have passed, and wait for the next to serve."""
        self._again = True
        await self._child.leave(seconds)
        self._heard(None)
        await self.serving()

    async def leave(self, seconds: float) -> None:
        """End it for good."""
        self._leaving.set()
        if self._child is not None:
            await self._child.leave(seconds)

    def record(self) -> None:
        """Have it write what it has dispatched lately, if it takes requests."""
        if self.address is not None:
            self._child.signal(signal.SIGUSR1)

    def _heard(self, address: str | None) -> None:
        if address != self.address:
            self.address, self._has_served = address, True
            (self._serving.set if address else self._serving.clear)()
            self._changed()


def serve(say: Callable[[Any], None], number: int, arguments: Arguments, environment: Mapping[str, str]) -> int:
    """Be a worker, in a process of its own.

    Args:
        say: to the parent: the address, once requests are taken; None when they are not any more.
        number: which.
        arguments: its own.
        environment: its own.
    """
    os.environ |= environment
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and is not given back by one that is killed
    prefix = f"%(asctime)s %(levelname)s worker {number} %(name)s: %(message)s"
    logging.basicConfig(level=arguments.log_level.upper(), format=prefix, force=True)

    async def main() -> int:
        worker = Worker(arguments, told=lambda serving: say(f"{arguments.host}:{worker.port}" if serving else None))
        return await worker.run()

    try:
        return asyncio.run(main())
    except (ValueError, OSError) as error:
        _LOG.critical("%s", error)
        return REFUSED


def arguments_of(arguments: Arguments) -> list[Arguments]:
    """Of each worker.

    Args:
        arguments: of all of them.
    """
    behind = {"host": "127.0.0.1", "api_key": None, "ssl_certfile": None, "ssl_keyfile": None}
    flights = arguments.flight_recorder
    return [
        dataclasses.replace(
            arguments,
            port=arguments.port + i if arguments.port else 0,
            metrics_port=arguments.metrics_port + i,
            metrics_host=arguments.metrics_host or arguments.host,
            flight_recorder=flights and flights / f"worker-{i}",
            **(behind if arguments.gateway else {}),
        )
        for i in range(arguments.replicas)
    ]
