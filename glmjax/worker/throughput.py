"""How many tokens a second, for who asks now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

_LEAST_SECONDS = 1.0
"""Between two looks: who asks sooner is told the last rate again, however many ask."""


class Throughput:
    """Of a counter that only grows.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._since = clock, clock()
        self._count, self._rate = 0, 0.0

    def __call__(self, count: int) -> float:
        """By how much it has grown a second since the last look.

        Args:
            count: where it stands.
        """
        now = self._clock()
        if (seconds := now - self._since) >= _LEAST_SECONDS:
            self._rate = (count - self._count) / seconds
            self._since, self._count = now, count
        return self._rate
