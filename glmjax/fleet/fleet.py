"""Workers and their gateway, from the first to the last."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from glmjax.fleet.devices import devices, devices_of
from glmjax.fleet.gateway import Gateway
from glmjax.fleet.replica import REFUSED, Replica, arguments_of
from glmjax.worker.arguments import Arguments

_LOG = logging.getLogger(__name__)
_GRACE = 15.0
"""Seconds beyond those for requests under way."""


class Fleet:
    """Several workers, with a gateway before them or without.

    Args:
        arguments: of all.

    Attributes:
        replicas: the workers.

    Raises:
        ValueError: there are too few GPUs, or no gateway.
    """

    def __init__(self, arguments: Arguments):
        self._arguments = arguments
        environments = devices_of(arguments.replicas, devices())
        each = zip(arguments_of(arguments), environments, strict=True)
        self.replicas = [Replica(i, own, environment, self._changed) for i, (own, environment) in enumerate(each)]
        self._gateway: Gateway | None = None
        self._routed: Sequence[str] = ()
        self._resting: Replica | None = None
        self._leaving = asyncio.Event()
        self._drain = arguments.drain_seconds + _GRACE

    async def run(self) -> int:
        """From the beginning to the end; the exit status: 0 after a signal, 1 where the gateway has died, 2 where the model
        cannot be served.
        """
        loop, rolling = asyncio.get_running_loop(), None
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.leave)

        def roll() -> None:
            nonlocal rolling
            if rolling is None or rolling.done():
                rolling = asyncio.ensure_future(self._roll())

        loop.add_signal_handler(signal.SIGHUP, roll)
        loop.add_signal_handler(signal.SIGUSR1, lambda: [replica.record() for replica in self.replicas])
        with tempfile.TemporaryDirectory(prefix="glmjax-") as folder:
            if self._arguments.gateway:
                self._gateway = Gateway(self._arguments, Path(folder))
                _LOG.info("gateway: %s/v1, once a worker serves", self._gateway.url)
            keeping = asyncio.create_task(self._keep())
            ends = [keeping, asyncio.create_task(self._leaving.wait())]
            if self._gateway is not None:
                ends.append(asyncio.create_task(self._gateway.process.ended()))
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            status = 0
            if keeping.done():
                status = keeping.result()
            elif not self._leaving.is_set():
                status = 1
                _LOG.critical("the gateway has ended with status %d; leaving", ends[-1].result())
            if rolling is not None:
                rolling.cancel()
            await self._end()
            await keeping
        return status

    def leave(self) -> None:
        """Begin to end: first the gateway, once it has answered those it has, and then the workers."""
        self._leaving.set()

    async def _keep(self) -> int:
        """Keep all running until they have left, or one cannot be served. The first compiles for all."""
        first, *others = self.replicas
        keeping = [asyncio.create_task(first.keep())]
        serving = asyncio.create_task(first.serving())
        await asyncio.wait([*keeping, serving], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            keeping += [asyncio.create_task(replica.keep()) for replica in others]
        serving.cancel()
        for ended in asyncio.as_completed(keeping):
            if await ended == REFUSED:
                return REFUSED
        return 0

    async def _roll(self) -> None:
        """Begin every worker anew, one at a time, while the others serve."""
        if len(self.replicas) == 1:
            _LOG.warning("there is one worker: requests would be lost; not beginning it anew")
            return
        for replica in self.replicas:
            await asyncio.gather(*(other.serving() for other in self.replicas))
            _LOG.info("worker %d begins anew", replica.number)
            await self._rest(replica)
            await replica.again(self._drain)
            await self._rest(None)
        _LOG.info("all workers have begun anew")

    async def _rest(self, replica: Replica | None) -> None:
        """Have the gateway ask all but one from now on, and wait until it does."""
        self._resting = replica
        self._changed()
        if self._gateway is not None and not await self._gateway.sends_to(self._routed):
            _LOG.warning("the gateway does not ask %s yet; going on", ", ".join(self._routed))

    async def _end(self) -> None:
        if self._gateway is not None:
            await self._gateway.process.leave(self._drain)
        await asyncio.gather(*(replica.leave(self._drain) for replica in self.replicas))

    def _changed(self) -> None:
        """Somebody takes requests now, or does not any more."""
        routed = [replica.address for replica in self.replicas if replica.address and replica is not self._resting]
        if routed != self._routed:
            self._routed = routed
            _LOG.info("%d of %d workers take requests", len(routed), len(self.replicas))
            if self._gateway is not None:
                self._gateway.send_to(routed)


def run(arguments: Arguments) -> int:
    """Serve until a signal comes; the exit status.

    Args:
        arguments: of all workers and the gateway.

    Raises:
        ValueError: there are too few GPUs, or no gateway.
    """

    async def main() -> int:
        return await Fleet(arguments).run()

    return asyncio.run(main())
