"""What goes wrong ends a call with a code that says what to do."""

import pytest
from grpc import StatusCode

from glmjax.serving.errors import (
    AnomalyError,
    ClosedError,
    DeadlineError,
    GrammarError,
    QueueFullError,
    UnavailableError,
)
from glmjax.worker.statuses import NotServingError, status_of


@pytest.mark.parametrize(
    ("error", "code", "metadata"),
    [
        (ValueError("top_p 3"), "INVALID_ARGUMENT", {"glmjax-reason": "invalid"}),
        (GrammarError("too complex"), "INVALID_ARGUMENT", {"glmjax-reason": "grammar"}),
        (
            QueueFullError("1024"),
            "RESOURCE_EXHAUSTED",
            {"glmjax-reason": "queue_full", "glmjax-retry-after-ms": "1000"},
        ),
        (DeadlineError("late"), "DEADLINE_EXCEEDED", {"glmjax-reason": "deadline"}),
        (AnomalyError("short", 7), "UNAVAILABLE", {"glmjax-reason": "anomaly", "glmjax-good-tokens": "7"}),
        (UnavailableError("lost"), "UNAVAILABLE", {"glmjax-reason": "engine"}),
        (ClosedError("closed"), "UNAVAILABLE", {"glmjax-reason": "closed"}),
        (NotServingError("draining"), "UNAVAILABLE", {"glmjax-reason": "draining", "glmjax-retry-after-ms": "1000"}),
        (NotImplementedError("no"), "UNIMPLEMENTED", {"glmjax-reason": "unimplemented"}),
        (KeyError("bug"), "INTERNAL", {"glmjax-reason": "internal"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_code_says_what_to_do(error, code, metadata):
    status = status_of(error)
    assert status.code is StatusCode[code]
    assert dict(status.metadata) == metadata
    assert status.details


def test_what_nobody_expects_is_named():
    assert status_of(KeyError("bug")).details == "KeyError: 'bug'"


def test_words_fit_a_header():
    assert len(status_of(ValueError("x" * 10**6)).details) == 1000
