"""Requests under way, by the id that the client gave them: to abort them, and to wait until there are none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from glmjax.serving.errors import ClosedError
from glmjax.serving.stream import Stream


class Live:
    """The requests of one worker. Only its event loop calls it."""

    def __init__(self):
        self._streams: dict[str, Stream | None] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    @contextlib.contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """A request is under way for as long as this context lasts; then it is over, whatever became of it.

        Raises:
            ValueError: another one of this name is under way.
        """
        if name in self._streams:
            raise ValueError(f"request_id {name[:100]!r} is under way already; give each request its own")
        self._streams[name] = None
        self._idle.clear()
        try:
            yield
        finally:
            _cancel(self._streams.pop(name))
            if not self._streams:
                self._idle.set()

    def attach(self, name: str, stream: Stream) -> None:
        """What a request is read from; one that is over is cancelled."""
        if name in self._streams:
            self._streams[name] = stream
        else:
            _cancel(stream)

    def abort(self, name: str) -> bool:
        """End a request where it is; whether it was under way."""
        stream = self._streams.get(name)
        _cancel(stream)
        return stream is not None

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing is under way, so many seconds at most; whether that is so."""
        if not self._streams:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True


def _cancel(stream: Stream | None) -> None:
    """One that has ended stays as it is."""
    if stream is not None:
        with contextlib.suppress(ClosedError):
            stream.cancel()
