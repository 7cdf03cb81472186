"""Prometheus metrics under the stems of vLLM's and SGLang's: what the engine has counted, and how long requests took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glmjax.serving.stats import EngineStats
from glmjax.serving.stream import Chunk

PREFIX = "glmjax:"
_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
_LENGTHS = (1.0, 1.25, 1.4, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
_RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 1.0)


class Metrics:
    """Of one worker.

    Args:
        model: the name that all metrics carry.
        stats: what the engine has done so far; None before there is one.

    Attributes:
        registry: of all of them.
        first: histogram of seconds to the first token.
        between: from one token to the next.
        whole: to the end.
        queued: to the admission.
        length: tokens of a round.
        rate: drafts accepted of those proposed.
    """

    def __init__(self, model: str, stats: Callable[[], EngineStats | None]):
        self.registry = CollectorRegistry()
        self.registry.register(_Counted(model, stats))

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            family = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)

        self._model = model
        self.first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token", _SECONDS)
        self.between = histogram("inter_token_latency_seconds", "From one token of a request to the next", _SECONDS)
        self.whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end", _SECONDS)
        self.queued = histogram("request_queue_time_seconds", "From a request's arrival to its admission", _SECONDS)
        self.length = histogram("spec_accept_length", "Tokens of a round, of requests that were drafted for", _LENGTHS)
        self.rate = histogram("spec_accept_rate", "Accepted of proposed drafts, of the same requests", _RATES)
        self._aborted = counter("aborted_requests", "Requests that did not come to their end, by reason", "reason")

    def request(self, n: int) -> Timed:
        """To be told of the chunks of a request's n sequences."""
        return Timed(self, n)

    def aborted(self, reason: str) -> None:
        """A request has not."""
        self._aborted.labels(self._model, reason).inc()

    def serve(self, port: int, host: str) -> Callable[[], None]:
        """Answer scrapes at /metrics; returns what ends that.

        Raises:
            OSError: the port is taken.
        """
        server, thread = start_http_server(port, host, self.registry)

        def close() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        return close


class Timed:
    """How long the tokens of a request took, by the engine's clock: how fast the client reads makes no difference.

    Args:
        metrics: of the worker.
        n: sequences.
    """

    def __init__(self, metrics: Metrics, n: int):
        self._metrics, self._seconds = metrics, [0.0] * n

    def push(self, chunk: Chunk) -> None:
        """Tokens of a sequence, and its end where they are the last."""
        metrics, statistics = self._metrics, chunk.statistics
        before, self._seconds[chunk.index] = self._seconds[chunk.index], statistics.seconds
        if statistics.new_tokens == len(chunk.ids) > 0:
            metrics.first.observe(statistics.first_token_seconds)
        else:
            for _ in chunk.ids:
                metrics.between.observe((statistics.seconds - before) / len(chunk.ids))
        if chunk.finish_reason not in (None, "cancelled"):
            metrics.whole.observe(statistics.seconds)
            metrics.queued.observe(statistics.queue_seconds)
            if statistics.drafted:
                metrics.length.observe(statistics.accept_length)
                metrics.rate.observe(statistics.accept_rate)


class _Counted(Collector):
    """What the engine has counted itself, read when somebody asks for it."""

    def __init__(self, model: str, stats: Callable[[], EngineStats | None]):
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters."""
        if (stats := self._stats()) is None:
            return
        gauges = {
            "num_requests_running": ("Requests with a slot", stats.running),
            "num_requests_waiting": ("Requests without one", stats.waiting),
            "kv_cache_usage_perc": ("Pages that sequences hold, of all", stats.usage),
            "kv_cache_cached_perc": ("Pages that are only kept for later, of all", stats.cached_pages / stats.pages),
        }
        counters = {
            "prompt_tokens": ("Of requests that were admitted", stats.prompt_tokens),
            "generation_tokens": ("Emitted", stats.new_tokens),
            "request_success": ("Requests that came to their end", stats.finished),
            "prefix_cache_queries": ("Tokens that were looked for in the cache", stats.prompt_tokens),
            "prefix_cache_hits": ("Of these, found", stats.cached_tokens),
            "num_preemptions": ("Sequences that lost their pages to others", stats.preemptions),
            "num_replays": ("Sequences that lost them to a fault", stats.replays),
            "spec_decode_num_drafts": (
                "Rounds in which something was drafted",
                stats.drafted_at[0] if stats.drafted_at else 0,
            ),
            "spec_decode_num_draft_tokens": ("Drafts", stats.drafted),
            "spec_decode_num_accepted_tokens": ("Of these, accepted", stats.accepted),
            "anomaly_suspicions": ("Requests that were suspicious", stats.suspicions),
            "corrupted_requests": ("Of these, those whose output was wrong", stats.restarts + stats.aborts),
            "device_seconds": ("That programs ran", stats.device_seconds),
            "host_seconds": ("Of the engine's thread", stats.host_seconds),
        }
        for name, (text, value) in gauges.items():
            yield self._family(GaugeMetricFamily, name, text, [((), value)])
        for name, (text, value) in counters.items():
            yield self._family(CounterMetricFamily, name, text, [((), value)])
        by_position = [((str(n),), value) for n, value in enumerate(stats.accepted_at)]
        text = "Accepted drafts by their place in a round"
        name = "spec_decode_num_accepted_tokens_per_pos"
        yield self._family(CounterMetricFamily, name, text, by_position, "position")

    def _family(self, kind: type, name: str, text: str, values: Iterable, *labels: str) -> Metric:
        family = kind(PREFIX + name, text, labels=["model_name", *labels])
        for of, value in values:
            family.add_metric([self._model, *of], value)
        return family
