"""What went wrong, as gRPC tells it: a code that says what to do, words, and trailing metadata for programs."""

from __future__ import annotations

from typing import NamedTuple

from grpc import StatusCode

from glmjax.serving.errors import (
    AnomalyError,
    ClosedError,
    DeadlineError,
    GrammarError,
    QueueFullError,
    UnavailableError,
)

REASON, GOOD_TOKENS, RETRY_AFTER = "glmjax-reason", "glmjax-good-tokens", "glmjax-retry-after-ms"
_LONGEST = 1000
"""Characters of the words: they travel in headers, whose size is limited."""
_RETRY_MS = 1000


class NotServingError(UnavailableError):
    """The worker takes no requests: not yet, or not any more.

    Attributes:
        reason: "starting", "draining" or "failed".
    """

    def __init__(self, reason: str):
        super().__init__(
            f"this worker {'has failed' if reason == 'failed' else f'is {reason}'}; send the request to another replica"
        )
        self.reason = reason


class Status(NamedTuple):
    """How a call ends.

    Attributes:
        code: gRPC's.
        details: words.
        metadata: trailing.
    """

    code: StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...]


def status_of(error: BaseException) -> Status:
    """Of an exception; INTERNAL where it is none that requests are expected to meet."""
    code, reason, more = _kind(error)
    details = str(error) if reason != "internal" else f"{type(error).__name__}: {error}"
    details = details if len(details) <= _LONGEST else f"{details[: _LONGEST - 1]}…"
    return Status(code, details, ((REASON, reason), *more))


def _kind(error: BaseException) -> tuple[StatusCode, str, tuple[tuple[str, str], ...]]:
    retry = ((RETRY_AFTER, str(_RETRY_MS)),)
    match error:
        case AnomalyError():
            return StatusCode.UNAVAILABLE, "anomaly", ((GOOD_TOKENS, str(error.good_tokens)),)
        case NotServingError():
            return StatusCode.UNAVAILABLE, error.reason, retry
        case UnavailableError():
            return StatusCode.UNAVAILABLE, "engine", ()
        case ClosedError():
            return StatusCode.UNAVAILABLE, "closed", ()
        case QueueFullError():
            return StatusCode.RESOURCE_EXHAUSTED, "queue_full", retry
        case DeadlineError():
            return StatusCode.DEADLINE_EXCEEDED, "deadline", ()
        case GrammarError():
            return StatusCode.INVALID_ARGUMENT, "grammar", ()
        case ValueError():
            return StatusCode.INVALID_ARGUMENT, "invalid", ()
        case NotImplementedError():
            return StatusCode.UNIMPLEMENTED, "unimplemented", ()
        case _:
            return StatusCode.INTERNAL, "internal", ()
