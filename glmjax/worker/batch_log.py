"""A line in the log for what the engine does: every batch of prompts, and every so many of decoding. The words are SGLang's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from glmjax.serving.plan import Plan
from glmjax.serving.programs import Log
from glmjax.serving.stats import EngineStats

_LOG = logging.getLogger(__name__)


class BatchLog:
    """Of one engine, whose thread calls it.

    Args:
        every: dispatches of decoding in a line.
    """

    def __init__(self, every: int = 40):
        self._every = every
        self._rounds = self._tokens = self._sequences = self._dispatches = 0
        self._since = time.monotonic()

    def __call__(self, plan: Plan, log: Log, stats: Callable[[], EngineStats]) -> None:
        """A dispatch has been read.

        Args:
            plan: of it.
            log: on the host.
            stats: the engine's, now.
        """
        if plan.chunks is not None:
            if _LOG.isEnabledFor(logging.INFO):
                self._read(plan, stats())
        elif plan.guesses is None:
            self._decoded(plan, log, stats)

    def _read(self, plan: Plan, stats: EngineStats) -> None:
        begin_B, count_B = plan.chunks.begin_B, plan.chunks.count_B
        new = [s for s, begin in zip(plan.sequences, begin_B, strict=False) if begin == s.request.cached]
        _LOG.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, #running-req: %d, "
            "#queue-req: %d",
            len(new),
            int(count_B.sum()),
            sum(s.request.cached for s in new),
            stats.usage,
            stats.running,
            stats.waiting,
        )

    def _decoded(self, plan: Plan, log: Log, stats: Callable[[], EngineStats]) -> None:
        count_ZB = log.count_ZB[: log.rounds]
        if not self._dispatches:
            self._since = time.monotonic()  # of pauses nothing is told
        self._dispatches += 1
        self._rounds += int((count_ZB > 0).sum())
        self._tokens += int(count_ZB.sum())
        if self._dispatches < self._every:
            return
        now, told = time.monotonic(), stats()
        _LOG.info(
            "Decode batch, #running-req: %d, token usage: %.2f, accept len: %.2f, gen throughput (token/s): %.1f, "
            "#queue-req: %d",
            told.running,
            told.usage,
            self._tokens / max(1, self._rounds),
            self._tokens / max(1e-9, now - self._since),
            told.waiting,
        )
        self._dispatches = self._rounds = self._tokens = 0
