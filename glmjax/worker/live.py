"""Requests under way, by the id that the client gave them: to abort them, and to wait until there are none."""

from __future__ import annotations

import asyncio
import contextlib

from glmjax.serving.errors import ClosedError
from glmjax.serving.stream import Stream


class Live:
    """The requests of one worker. Only its event loop calls it, and the requests'."""

    def __init__(self):
        self._requests: dict[str, LiveRequest] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._requests)

    def enter(self, name: str) -> LiveRequest:
        """A request is under way from now on, until it leaves.

        Raises:
            ValueError: another one of this name is under way.
        """
        if name in self._requests:
            raise ValueError(f"request_id {name[:100]!r} is under way already; give each request its own")
        request = self._requests[name] = LiveRequest(self, name)
        self._idle.clear()
        return request

    def abort(self, name: str) -> bool:
        """End a request where it is; whether it was under way."""
        if (request := self._requests.get(name)) is None:
            return False
        request.abort()
        return True

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing is under way, so many seconds at most; whether that is so."""
        if not self._requests:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _leave(self, request: LiveRequest) -> None:
        if self._requests.get(request.name) is request:
            del self._requests[request.name]
        if not self._requests:
            self._idle.set()


class LiveRequest:
    """A request under way.

    Args:
        live: among which.
        name: the client's id for it.
    """

    def __init__(self, live: Live, name: str):
        self.name = name
        self._live, self._aborted = live, False
        self._stream: Stream | None = None

    def attach(self, stream: Stream) -> None:
        """What it is read from; cancelled at once if it has been aborted, or has left, meanwhile."""
        self._stream = stream
        if self._aborted:
            self.abort()

    def abort(self) -> None:
        """End it where it is; what has ended stays as it is."""
        self._aborted = True
        if self._stream is not None:
            with contextlib.suppress(ClosedError):
                self._stream.cancel()

    def leave(self) -> None:
        """It is over, whatever became of it."""
        self.abort()
        self._live._leave(self)
