"""Those who wait for a slot: fair between clients, by priority, and with limits."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterator

from glmjax.serving.errors import QueueFullError
from glmjax.serving.request import Request


class Waiting:
    """Requests in the order in which they should be admitted.

    Clients take turns by tokens, not by requests (start-time fair queueing): a request's tag is where its client's turn
    begins, which moves on by what the client asks for, and the lowest tag is next. Who floods the queue delays himself.
    A lower priority goes first, but a request rises by one for every `ageing` seconds it waits.

    Args:
        most: how many may wait in all.
        most_of_client: how many of one client.
        ageing: seconds.
    """

    def __init__(self, *, most: int, most_of_client: int, ageing: float = 10.0):
        self._most, self._most_of_client, self._ageing = most, most_of_client, ageing
        self._places: Counter[Hashable] = Counter()  # taken, by client; whoever asks for one may be on another thread
        self._lock = threading.Lock()
        self._lines: dict[tuple[Hashable, int], deque[tuple[int, Request]]] = {}
        self._turns: dict[Hashable, int] = {}  # where each waiting client's next turn begins
        self._now = 0  # the tag that was served last

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Request]:
        return (request for line in self._lines.values() for _, request in line)

    def reserve(self, client: Hashable) -> None:
        """Take a place for a request to come; the one method that any thread may call.

        Raises:
            QueueFullError: there is none.
        """
        with self._lock:
            if self._places.total() >= self._most:
                raise QueueFullError(f"{self._most} requests wait already (max_queued); try again later or elsewhere")
            if self._places[client] >= self._most_of_client:
                raise QueueFullError(
                    f"{self._most_of_client} requests of this client wait already (max_queued_per_client); let some finish"
                )
            self._places[client] += 1

    def push(self, request: Request) -> None:
        """Let a request wait, in the place that was reserved for it."""
        tag = max(self._now, self._turns.get(request.client, 0))
        self._turns[request.client] = tag + request.cost
        self._lines.setdefault((request.client, request.priority), deque()).append((tag, request))

    def push_back(self, request: Request) -> None:
        """Give a request that had been served already the next turn of its client. It is never refused."""
        with self._lock:
            self._places[request.client] += 1
        self._lines.setdefault((request.client, request.priority), deque()).appendleft((self._now, request))

    def next(self, now: float) -> Request | None:
        """Who is to be admitted next, or None where nobody waits.

        Args:
            now: `time.monotonic()`.
        """
        chosen = min(self._heads(now), default=None)
        return None if chosen is None else self._lines[chosen[-1]][0][1]

    def pop(self, now: float) -> Request:
        """Take out who is next.

        Raises:
            IndexError: nobody waits.
        """
        chosen = min(self._heads(now), default=None)
        if chosen is None:
            raise IndexError("nobody waits")
        place = chosen[-1]
        tag, request = self._lines[place].popleft()
        self._now = max(self._now, tag)
        self._free(place)
        return request

    def remove(self, request: Request) -> bool:
        """Take out one of them; whether it was there."""
        place = request.client, request.priority
        line = self._lines.get(place, deque())
        for n, (_, other) in enumerate(line):
            if other is request:
                del line[n]
                self._free(place)
                return True
        return False

    def _heads(self, now: float) -> Iterator[tuple[float, int, int, tuple[Hashable, int]]]:
        """The first of each line: priority with age, tag, number, and the line, which numbers keep from comparing."""
        for place, line in self._lines.items():
            tag, request = line[0]
            risen = int((now - request.arrived) / self._ageing)
            yield request.priority - risen, tag, request.number, place

    def _free(self, place: tuple[Hashable, int]) -> None:
        """Somebody has left a line."""
        client = place[0]
        with self._lock:
            self._places[client] -= 1
            self._places += Counter()  # without those at 0
        if not self._lines[place]:
            del self._lines[place]
            if not any(other == client for other, _ in self._lines):
                self._turns.pop(client, None)
