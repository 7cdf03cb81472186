"""A process of this one's: it says what it has to say over a pipe, and does not outlive its parent."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PROCESSES = multiprocessing.get_context("spawn")  # nothing of a parent with threads is forked


class Child:
    """A process, from its beginning to its end. Belongs to the event loop that made it.

    Args:
        name: of the process.
        run: what it does, with a function to say something with and the arguments; gives its exit status. Importable.
        arguments: which can be pickled.
        heard: is called with what it says.
    """

    def __init__(self, name: str, run: Callable[..., int], *arguments: Any, heard: Callable[[Any], None]):
        self._pipe, other = _PROCESSES.Pipe(duplex=False)
        self._heard, self._loop = heard, asyncio.get_running_loop()
        self._process = _PROCESSES.Process(target=_begin, args=(run, other, arguments), name=name, daemon=True)
        self._process.start()
        other.close()
        self._ended = self._loop.create_future()
        self._loop.add_reader(self._pipe.fileno(), self._hear)
        self._loop.add_reader(self._process.sentinel, self._end)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if not self._ended.done():
            os.kill(self.pid, number)

    async def ended(self) -> int:
        """Wait for its end; the exit status, negative for the signal that has ended it."""
        return await asyncio.shield(self._ended)

    async def leave(self, seconds: float) -> int:
        """Ask it to leave, and make it leave once so many seconds have passed; the exit status."""
        self._process.terminate()
        try:
            return await asyncio.wait_for(self.ended(), seconds)
        except TimeoutError:
            self._process.kill()
            return await self.ended()

    def _hear(self) -> None:
        try:
            self._heard(self._pipe.recv())
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())

    def _end(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._loop.remove_reader(self._pipe.fileno())
        self._process.join()
        self._pipe.close()
        self._ended.set_result(self._process.exitcode)


def _begin(run: Callable[..., int], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    """In the process."""
    os.setpgid(0, 0)  # Ctrl-C is the parent's, who ends all in order
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    def say(message: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(message)

    os._exit(run(say, *arguments))  # what is still being compiled is not waited for


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
