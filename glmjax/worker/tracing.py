"""Spans of requests for OpenTelemetry, where it is installed and asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from glmjax.serving.stream import Chunk, Statistics


@runtime_checkable
class Traces(Protocol):
    """Where spans go."""

    def request(self, name: str, metadata: Sequence[tuple[str, Any]]) -> Span:
        """A span that begins now.

        Args:
            name: the client's, of the request.
            metadata: of the call, which may say what the span is part of (W3C's traceparent).
        """


@runtime_checkable
class Span(Protocol):
    """Of a request."""

    def push(self, chunk: Chunk) -> None:
        """A chunk of it has come."""

    def end(self, error: str | None = None) -> None:
        """It is over.

        Args:
            error: the reason, if it has failed.
        """


class NoTraces:
    """Nothing is traced."""

    def request(self, name: str, metadata: Sequence[tuple[str, Any]]) -> NoTraces:
        """Nothing."""
        return self

    def push(self, chunk: Chunk) -> None:
        """Nothing."""

    def end(self, error: str | None = None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class OpenTelemetry:
    """Spans by OpenTelemetry's SDK, named and described by its conventions for generative models.

    Args:
        model: the served model's name.
        exporter: where spans go, a `SpanExporter`.
    """

    def __init__(self, model: str, exporter: Any):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "glmjax"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer, self._model = self._provider.get_tracer("glmjax"), model

    def request(self, name: str, metadata: Sequence[tuple[str, Any]]) -> _RequestSpan:
        """See `Traces`."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            f"generate {self._model}",
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": self._model,
                "gen_ai.request.id": name,
            },
        )
        return _RequestSpan(span)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


class _RequestSpan:
    """See `Span`."""

    def __init__(self, span: Any):
        self._span, self._ended = span, list[Statistics]()
        self._reasons: list[str] = []

    def push(self, chunk: Chunk) -> None:
        if chunk.finish_reason is not None:
            self._reasons.append(chunk.finish_reason)
            self._ended.append(chunk.statistics)

    def end(self, error: str | None = None) -> None:
        if self._ended:
            self._span.set_attributes(_described(self._ended) | {"gen_ai.response.finish_reasons": self._reasons})
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


def _described(sequences: Iterable[Statistics]) -> dict[str, int | float]:
    first, *_ = sequences = list(sequences)
    return {
        "gen_ai.usage.input_tokens": first.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": first.cached_tokens,
        "gen_ai.usage.output_tokens": sum(one.new_tokens for one in sequences),
        "gen_ai.latency.time_in_queue": first.queue_seconds,
        "gen_ai.latency.time_to_first_token": first.first_token_seconds or 0.0,
        "gen_ai.latency.e2e": max(one.seconds for one in sequences),
        "glmjax.accepted_drafts": sum(one.accepted for one in sequences),
        "glmjax.preemptions": sum(one.preemptions for one in sequences),
        "glmjax.replays": sum(one.replays for one in sequences),
    }


def traces_to(endpoint: str | None, model: str) -> NoTraces | OpenTelemetry:
    """Where spans go.

    Args:
        endpoint: of an OTLP collector's gRPC port, such as http://localhost:4317; None traces nothing.
        model: the served model's name.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return NoTraces()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError(
            f'--otlp-traces-endpoint needs OpenTelemetry ({error}); install it: pip install "glmjax[otel]"'
        ) from error
    return OpenTelemetry(model, OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https:")))
