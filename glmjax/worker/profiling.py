"""Traces of the device on request, by `jax.profiler`: for TensorBoard and xprof."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Coroutine
from typing import Any

import jax

_POLL_SECONDS = 0.02


class Profiler:
    """Of a process, in which one trace can be under way. Only the worker's event loop calls it.

    Args:
        folder: where traces go that are not told where; default a new one among the temporary files.
    """

    def __init__(self, folder: str | None = None):
        self._default, self._folder = folder, ""
        self._watch: asyncio.Task | None = None
        self._turn = asyncio.Lock()

    async def start(self, folder: str = "", dispatches: int = 0, count: Callable[[], int] = lambda: 0) -> str:
        """Begin a trace; where it goes. It is begun also if nobody waits for it any more.

        Args:
            folder: where.
            dispatches: after which it ends by itself; 0 for never.
            count: dispatches so far.

        Raises:
            ValueError: one is under way.
            OSError: the folder cannot be written to.
        """
        return await _to_its_end(self._start(folder, dispatches, count))

    async def stop(self) -> str:
        """End the trace; where it is.

        Raises:
            ValueError: none is under way.
        """
        return await _to_its_end(self._stop())

    async def _start(self, folder: str, dispatches: int, count: Callable[[], int]) -> str:
        async with self._turn:
            return await self._begin(folder, dispatches, count)

    async def _begin(self, folder: str, dispatches: int, count: Callable[[], int]) -> str:
        if self._folder:
            raise ValueError(f"a trace is under way, to {self._folder}; stop it first")
        self._folder = folder or self._default or tempfile.mkdtemp(prefix="glmjax-profile-")
        try:
            # JAX would notice at the end that it cannot write there, and never begin another.
            await asyncio.to_thread(os.makedirs, self._folder, exist_ok=True)
            await asyncio.to_thread(jax.profiler.start_trace, self._folder)
        except BaseException:
            self._folder = ""
            raise
        if dispatches:
            last = count() + dispatches
            self._watch = asyncio.create_task(self._until(lambda: count() >= last))
        return self._folder

    async def _stop(self) -> str:
        async with self._turn:
            return await self._end()

    async def _end(self) -> str:
        if not self._folder:
            raise ValueError("no trace is under way; start one first")
        folder, self._folder = self._folder, ""
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        self._watch = None
        await asyncio.to_thread(jax.profiler.stop_trace)
        return folder

    async def _until(self, over: Callable[[], bool]) -> None:
        while not over():
            await asyncio.sleep(_POLL_SECONDS)
        await self.stop()


async def _to_its_end(work: Coroutine[Any, Any, str]) -> str:
    """What something gives that goes on to its end, whoever leaves meanwhile."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return await asyncio.shield(task)
