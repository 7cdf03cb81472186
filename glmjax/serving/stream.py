"""What a client gets: chunks of tokens as they come, by iteration in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from glmjax.serving.captures import Captures, Pieces


@dataclasses.dataclass(frozen=True)
class Score:
    """The model's own opinion of an emitted token, before penalties and temperature.

    Attributes:
        logprob: log of its probability.
        rank: its place among all tokens, from 1.
        top: the best alternatives (id, logprob), as many as were asked for.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """How a request went. Times in seconds, from its arrival.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, found in the prefix tree.
        new_tokens: tokens emitted.
        rounds: of decoding, the first token aside; none under a grammar.
        drafted: drafts proposed.
        accepted: drafts accepted.
        queue_seconds: until it was admitted.
        first_token_seconds: until its first token; None before that.
        seconds: until its end, or until now.
        preemptions: how often others took its pages.
        replays: how often a fault took them.
        seed: the sampling seed, with which the output can be had again.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    rounds: int
    drafted: int
    accepted: int
    queue_seconds: float
    first_token_seconds: float | None
    seconds: float
    preemptions: int
    replays: int
    seed: int | None

    @property
    def accept_length(self) -> float:
        """Tokens of a round: accepted drafts and one; 1 where nothing was drafted."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    @property
    def accept_rate(self) -> float:
        """Accepted drafts of those proposed; 0 where none were."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some tokens of a sequence.

    Attributes:
        ids: new tokens.
        text: what can be shown now.
        index: which of the request's n sequences.
        scores: one for each token, where logprobs were asked for.
        finish_reason: "stop", "length" or "cancelled" on the last chunk, else None.
        matched: the stop token or string that ended it, or None: also where nothing more was allowed by the grammar.
        statistics: how it has gone so far.
    """

    ids: tuple[int, ...]
    text: str
    index: int = 0
    scores: tuple[Score, ...] = ()
    finish_reason: str | None = None
    matched: int | str | None = None
    statistics: Statistics | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A whole sequence: what its chunks come to.

    Attributes:
        ids: its tokens, a final stop token included.
        text: without a stop token's own.
        scores: one for each token, where logprobs were asked for.
        finish_reason: "stop", "length" or "cancelled".
        statistics: how it went.
        prompt_scores: of the prompt's tokens from the second on, where they were asked for.
    """

    ids: tuple[int, ...]
    text: str
    scores: tuple[Score, ...]
    finish_reason: str
    statistics: Statistics
    prompt_scores: tuple[Score, ...] = ()


@dataclasses.dataclass
class _Kept:
    """Chunks that are kept back, and how many tokens are in them."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    tokens: int = 0


class Stream:
    """Chunks of a request's sequences, in the order in which they were made.

    Iterate with ``for`` in a thread or ``async for`` in an event loop; it ends when all sequences have. Whoever reads
    slowly keeps nobody waiting. To leave before the end, `cancel`.

    What the reader has not seen the engine can take back. So who would rather wait than read what turns out wrong holds
    tokens back.

    Args:
        sequences: n, how many there are.
        cancelled: what to call when the reader cancels.
        holdback: tokens of a sequence that are kept back until there are more, or it has ended; `math.inf` for all.

    Attributes:
        prompt_scores: of the prompt's tokens from the second on, where they were asked for; complete with the first chunk.
    """

    def __init__(self, sequences: int = 1, cancelled: Callable[[], None] = lambda: None, holdback: float | int = 0):
        self._sequences, self._running, self._cancelled = sequences, sequences, cancelled
        self._holdback = holdback
        self.prompt_scores: tuple[Score, ...] = ()
        self._kept = {index: _Kept() for index in range(sequences)}  # of those of which nothing has been shown
        self._chunks: deque[Chunk] = deque()
        self._captured = [Pieces() for _ in range(sequences)]
        self._begun: set[int] = set()  # sequences of which a chunk has been read
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Future] | None = None

    def put(self, chunk: Chunk) -> None:
        """Add a chunk; one with a finish reason ends its sequence. For the engine."""
        with self._changed:
            if self._error is not None:
                return
            self._running -= chunk.finish_reason is not None
            if (kept := self._kept.get(chunk.index)) is None:
                self._chunks.append(chunk)
            else:
                kept.chunks.append(chunk)
                kept.tokens += len(chunk.ids)
                if chunk.finish_reason is None and kept.tokens <= self._holdback:
                    return
                self._chunks.extend(self._kept.pop(chunk.index).chunks)
            self._wake()

    def capture(self, index: int, begin: int, captured: Any) -> None:
        """Add what hooks have captured of a sequence from a position on, before its chunk. For the engine."""
        with self._changed:
            self._captured[index].add(begin, captured)

    def score_prompt(self, scores: Iterable[Score]) -> None:
        """Add what the model thinks of the prompt. For the engine."""
        self.prompt_scores = tuple(scores)

    def captures(self, index: int = 0) -> Captures:
        """What hooks have captured of a sequence so far; with its last chunk, of all tokens that were read but cached ones.

        Args:
            index: which of the n sequences.

        Raises:
            ValueError: what was captured cannot be put together.
        """
        with self._changed:
            pieces = self._captured[index].copy()
        return pieces.joined()

    def fail(self, error: BaseException) -> None:
        """End all sequences with an error, which the reader meets after what was shown before it. For the engine."""
        with self._changed:
            if self._running and self._error is None:
                self._error = error
                self._wake()

    def take_back(self, index: int) -> bool:
        """Forget a sequence's chunks, unless one of them has been read; whether that was so. For the engine."""
        with self._changed:
            if index in self._begun:
                return False
            self._chunks = deque(chunk for chunk in self._chunks if chunk.index != index)
            self._kept[index] = _Kept()
            self._captured[index] = Pieces()
            return True

    def cancel(self) -> None:
        """Leave: the sequences end where they are."""
        self._cancelled()

    def finish(self) -> list[Result]:
        """Read to the end: the whole of each sequence.

        Raises:
            DeadlineError: the request's time was over.
            UnavailableError: the engine could not finish it.
        """
        chunks: list[list[Chunk]] = [[] for _ in range(self._sequences)]
        for chunk in self:
            chunks[chunk.index].append(chunk)
        return [
            Result(
                ids=tuple(token for chunk in mine for token in chunk.ids),
                text="".join(chunk.text for chunk in mine),
                scores=tuple(score for chunk in mine for score in chunk.scores),
                finish_reason=mine[-1].finish_reason,
                statistics=mine[-1].statistics,
                prompt_scores=self.prompt_scores,
            )
            for mine in chunks
        ]

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._changed:
            self._changed.wait_for(self._settled)
            if (chunk := self._next()) is None:
                raise StopIteration
            return chunk

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            with self._changed:
                if self._settled():
                    if (chunk := self._next()) is None:
                        raise StopAsyncIteration
                    return chunk
                loop = asyncio.get_running_loop()
                self._reader = loop, (changed := loop.create_future())
            try:
                await changed
            except asyncio.CancelledError:
                self.cancel()
                raise

    def _settled(self) -> bool:
        return bool(self._chunks) or self._error is not None or not self._running

    def _next(self) -> Chunk | None:
        if self._chunks:
            chunk = self._chunks.popleft()
            self._begun.add(chunk.index)
            return chunk
        if self._error is not None:
            raise self._error
        return None

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._reader is not None:
            (loop, changed), self._reader = self._reader, None
            with contextlib.suppress(RuntimeError):  # the reader's loop is closed: nobody waits
                loop.call_soon_threadsafe(lambda: changed.done() or changed.set_result(None))
