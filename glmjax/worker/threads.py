"""Calls that may take long, or for ever, in threads that nobody waits for when the process ends.

The event loop's own executor is joined at its end, and what asks an engine's thread comes back when a step has ended: if
none ever does, the worker must leave all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable


def in_thread[T](make: Callable[[], T]) -> asyncio.Future[T]:
    """What a function gives, run in a daemon thread of its own.

    Args:
        make: the function; what it raises, the future raises.

    Raises:
        RuntimeError: no event loop runs here.
    """
    loop = asyncio.get_running_loop()
    made: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if not made.cancelled():
            made.set_result(result) if error is None else made.set_exception(error)

    def run() -> None:
        try:
            told = make(), None
        except Exception as error:
            told = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, *told)

    threading.Thread(target=run, daemon=True).start()
    return made
