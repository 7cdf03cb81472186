"""Spans tell how requests went, and whose part they are."""

import sys
import time

import grpc
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from glmjax.worker import tracing
from glmjax.worker.tracing import NoTraces, OpenTelemetry, traces_to
from tests.worker.running import Running, asked, complete, endless, failure, until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def traced():
    """A worker, and the spans of what it has been asked; they are read by their requests' names."""
    exporter = InMemorySpanExporter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmjax.worker.lifecycle.traces_to", lambda endpoint, model: OpenTelemetry(model, exporter))
        running = Running().ready()

    def span(name):
        def found():
            running.worker._traces._provider.force_flush()
            return [span for span in exporter.get_finished_spans() if span.attributes["gen_ai.request.id"] == name]

        until(found)
        return found()[0]

    yield running, span
    running.leave()
    assert running.closed() == 0


def test_a_request_is_a_span_of_its_own(traced):
    running, span = traced
    before = time.time_ns()
    [whole] = complete(running, asked(name="whole", n=1))
    found = span("whole")
    assert found.parent is None
    assert before <= found.start_time <= found.end_time <= time.time_ns()
    assert found.attributes["gen_ai.usage.input_tokens"] == whole.prompt_tokens
    assert found.attributes["gen_ai.usage.output_tokens"] == whole.completion_tokens
    assert found.attributes["gen_ai.response.finish_reasons"] == (whole.finish_reason,)
    seconds = (found.end_time - found.start_time) / 1e9
    first, total = (found.attributes[f"gen_ai.latency.{name}"] for name in ("time_to_first_token", "e2e"))
    assert 0 < first <= total <= seconds
    assert found.status.status_code is StatusCode.UNSET


def test_it_is_part_of_the_callers_trace(traced):
    running, span = traced
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
    list(running.stub.Generate(asked(name="part"), metadata=metadata))
    found = span("part")
    assert f"{found.context.trace_id:032x}" == TRACE
    assert f"{found.parent.span_id:016x}" == PARENT


def test_tokens_of_all_sequences_count(traced):
    running, span = traced
    answers = complete(running, asked(name="several", n=2))
    expected = sum(answer.completion_tokens for answer in answers)
    assert span("several").attributes["gen_ai.usage.output_tokens"] == expected


def test_what_fails_says_why(traced):
    running, span = traced
    assert failure(running.stub.Generate(asked(name="bad", top_p=7.0)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert span("bad").status.status_code is StatusCode.ERROR
    assert span("bad").attributes["error.type"] == "invalid"
    call = running.stub.Generate(endless("left"))
    next(call)
    call.cancel()
    assert span("left").attributes["error.type"] == "cancelled"


def test_nothing_is_traced_unless_asked_for():
    assert isinstance(traces_to(None, "glm"), NoTraces)


def test_who_asks_without_the_package_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ValueError, match=r"install it: pip install \"glmjax\[otel\]\""):
        tracing.traces_to("http://localhost:4317", "glm")


def test_spans_go_to_a_collector():
    traces = traces_to("http://localhost:1", "glm")
    assert isinstance(traces, OpenTelemetry)
    traces.close()
