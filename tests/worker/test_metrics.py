"""What Prometheus reads: the engine's counters, and how long requests took by the engine's clock."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from glmjax.serving.stats import EngineStats
from glmjax.serving.stream import Chunk, Statistics
from glmjax.worker.metrics import Metrics

STATS = EngineStats(
    running=2,
    waiting=1,
    pages=10,
    held_pages=4,
    cached_pages=3,
    prompt_tokens=100,
    cached_tokens=80,
    new_tokens=50,
    drafted=30,
    accepted=12,
    drafted_at=(15, 15),
    accepted_at=(9, 3),
    restarts=1,
    aborts=2,
)


def statistics(new, seconds, **more):
    fields = {"drafted": 0, "accepted": 0, "rounds": 4} | more
    times = {"queue_seconds": 0.5, "first_token_seconds": 1.0, "seconds": seconds}
    return Statistics(
        prompt_tokens=9, cached_tokens=8, new_tokens=new, preemptions=0, replays=0, seed=0, **times, **fields
    )


@pytest.fixture
def read():
    """Metrics served, and what a scrape gives: values by name and labels other than the model's."""
    metrics = Metrics("glm", lambda: STATS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    close = metrics.serve(port, "127.0.0.1")

    def scrape():
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        assert {sample.labels.pop("model_name") for sample in samples} == {"glm"}
        return {(s.name.removeprefix("glmjax:"), *s.labels.values()): s.value for s in samples}

    yield metrics, scrape
    close()


def test_the_engines_counters_are_there(read):
    _, scrape = read
    found = scrape()
    assert (found["num_requests_running",], found["num_requests_waiting",]) == (2, 1)
    assert found["kv_cache_usage_perc",] == 0.4
    assert (found["prefix_cache_queries_total",], found["prefix_cache_hits_total",]) == (100, 80)
    assert found["spec_decode_num_drafts_total",] == 15
    assert found["spec_decode_num_accepted_tokens_per_pos_total", "1"] == 3
    assert found["corrupted_requests_total",] == 3


def test_times_are_the_engines(read):
    metrics, scrape = read
    request = metrics.request(1)
    request.push(Chunk((1,), "", 0, statistics=statistics(1, 1.0)))
    request.push(Chunk((2, 3), "", 0, statistics=statistics(3, 2.0)))
    request.push(Chunk((4,), "", 0, finish_reason="stop", statistics=statistics(4, 4.0, drafted=8, accepted=6)))
    found = scrape()
    assert (found["time_to_first_token_seconds_count",], found["time_to_first_token_seconds_sum",]) == (1, 1.0)
    assert (found["inter_token_latency_seconds_count",], found["inter_token_latency_seconds_sum",]) == (3, 3.0)
    assert found["e2e_request_latency_seconds_sum",] == 4.0
    assert found["request_queue_time_seconds_sum",] == 0.5
    assert found["spec_accept_length_sum",] == 2.5
    assert found["spec_accept_rate_sum",] == 0.75


def test_what_was_not_drafted_for_is_not_counted_as_rejected(read):
    metrics, scrape = read
    metrics.request(1).push(Chunk((1,), "", 0, finish_reason="stop", statistics=statistics(1, 1.0)))
    assert scrape()["spec_accept_rate_count",] == 0


def test_requests_that_do_not_end_are_counted_by_reason(read):
    metrics, scrape = read
    metrics.aborted("deadline")
    metrics.aborted("deadline")
    metrics.request(2).push(Chunk((), "", 1, finish_reason="cancelled", statistics=statistics(0, 1.0)))
    found = scrape()
    assert found["aborted_requests_total", "deadline"] == 2
    assert found["e2e_request_latency_seconds_count",] == 0


def test_before_there_is_an_engine_there_are_no_counters():
    assert Metrics("glm", lambda: None).registry.get_sample_value("glmjax:num_requests_running") is None
