"""A long time of everything: no token is wrong, no page is lost, and nothing is kept of those who have left.

`make test` has a short time of it, `make soak` the long one.
"""

import ctypes
import dataclasses
import gc
import os
import time
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.engine import Engine
from glmjax.serving.errors import DeadlineError
from glmjax.serving.recorder import Recorder
from tests.serving.races import Races, race
from tests.serving.tiny import OFFLOADING, tiny

STEPS = 20_000
INFLIGHT = 12
GROWTH = 8 << 20  # bytes of this process after the warm-up; what a test plants is beyond it
CONFIG = dataclasses.replace(
    OFFLOADING,
    max_num_seqs=4,
    pages=14,
    num_draft=2,
    offload_bytes=1 << 19,
    anomalies=AnomalyRules(window=4, least_tokens=8),  # suspicious of many, who are all confirmed
    recorded_dispatches=200,
    debug=True,
)


@pytest.mark.soak
def test_races_for_a_long_time(say):
    begun, told = time.monotonic(), Counter(Races.counts)
    while (found := Races.counts - told)["steps"] < STEPS:
        race(max_examples=200, stateful_step_count=100, suppress_health_check=list(hypothesis.HealthCheck))
    say(f"races in {time.monotonic() - begun:.0f} s:", *(f"{name} {count:,}," for name, count in sorted(found.items())))


# The engine


@pytest.fixture(scope="module")
def engine():
    """Attends to everything, so that no choice of positions is a tie."""
    with Engine(tiny(index_topk=CONFIG.max_model_len), CONFIG) as engine:
        yield engine


@pytest.fixture
def say(capsys):
    def said(*words):
        with capsys.disabled():
            print(*words, flush=True)

    return said


class Clients:
    """Many, of all kinds: they ask, wait or not, and leave when they like.

    Args:
        engine: that they ask.
        seed: of everything.

    Attributes:
        counts: how requests ended, tokens compared, and those that were other than the last time.
    """

    def __init__(self, engine, seed=0):
        self._engine, self._rng = engine, np.random.default_rng(seed)
        self._documents = self._rng.integers(0, 16, (4, 40)).tolist()
        self._answers = {}  # to what has been asked before
        self._streams = []
        self.counts = Counter()

    def ask(self, requests):
        """So many requests, some at a time; all have ended or been left when it returns."""
        for _ in range(requests):
            if len(self._streams) == INFLIGHT:
                self._read(*self._streams.pop(self._rng.integers(INFLIGHT)))
            self._streams.append(self._asked())
        while self._streams:
            self._read(*self._streams.pop())

    def _asked(self):
        rng = self._rng
        prompt = self._documents[rng.integers(4)][: rng.integers(1, 41)]
        told = {"seed": int(rng.integers(2)), "temperature": float(rng.choice([0, 1.5]))}
        stream = self._engine.generate(
            prompt,
            **told,
            max_new_tokens=int(rng.integers(1, 25)),
            n=int(rng.choice([1, 1, 1, 2, 3])),
            priority=int(rng.integers(3)),
            client=int(rng.integers(3)),
            cache_salt=rng.choice([None, "a", "b"]),
            use_cache=bool(rng.random() < 0.9),
            timeout=None if rng.random() < 0.9 else rng.uniform(0, 0.05),
            logprobs=None if rng.random() < 0.9 else 2,
        )
        patience = np.inf if rng.random() < 0.7 else rng.integers(0, 4)  # chunks until it leaves
        return stream, (len(prompt), *prompt[:3], *told.values()), patience

    def _read(self, stream, asked, patience):
        answers = {}
        if not patience:
            stream.cancel()
            if self._rng.random() < 0.5:
                self.counts["left"] += 1
                return  # and never looks at it again
        try:
            for chunk in stream:
                answers[chunk.index] = (*answers.get(chunk.index, ()), *chunk.ids)
                patience -= 1
                if not patience:
                    stream.cancel()
                if chunk.finish_reason:
                    self.counts[chunk.finish_reason] += 1
        except DeadlineError:
            self.counts["late"] += 1
        for index, ids in answers.items():
            self._compare((*asked, index), ids)

    def _compare(self, asked, ids):
        before = self._answers.get(asked, ())
        self.counts["tokens"] += len(ids)
        self.counts["other"] += ids[: len(before)] != before[: len(ids)]
        self._answers[asked] = max(before, ids, key=len)


def check_that_nothing_is_left(engine):
    while (stats := engine.stats()).running or stats.waiting:
        time.sleep(0.01)
    running = engine._running
    running.check()
    running.pool.check([running.tree])
    assert stats.free_pages + stats.cached_pages == stats.pages
    assert not running.waiting._places
    assert not running.waiting._turns


def resident():
    """Bytes of this process in memory, without what is free: in its shadow a leak would not be seen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(engine, requests, warm, say=lambda *_: None):
    """Serve requests; by how many bytes this process has grown since the first `warm` of them."""
    clients, begun, sizes = Clients(engine), time.monotonic(), []
    for done in range(warm, requests + 1, warm):
        clients.ask(warm)
        check_that_nothing_is_left(engine)
        sizes.append(resident())
        say(f"{done:,} requests, {time.monotonic() - begun:.0f} s, {sizes[-1] / 2**20:.1f} MB, {dict(clients.counts)}")
    counts, stats = clients.counts, engine.stats()
    assert counts["other"] <= counts["tokens"] / 10_000, "answers differ by more than rounding"
    assert not stats.aborts + stats.restarts, "somebody honest was not confirmed"
    assert min(counts[end] for end in ("length", "cancelled", "left", "late")) > 0
    assert min(stats.landed, stats.preemptions, stats.accepted, stats.benign, stats.cached_tokens) > 0
    say(stats)
    return sizes[-1] - sizes[0]


@pytest.mark.parametrize(
    ("requests", "warm"), [pytest.param(160, 80, id="short"), pytest.param(10_000, 1_000, marks=pytest.mark.soak)]
)
def test_an_engine_keeps_nothing_of_those_who_have_left(engine, requests, warm, say, request):
    grown = soak(engine, requests, warm, say if request.node.get_closest_marker("soak") else lambda *_: None)
    assert grown < GROWTH, f"{grown / 2**20:.1f} MB more than after the first {warm} requests"


def test_what_is_kept_would_be_seen(engine, monkeypatch):
    """A recorder that keeps 256 kB of each dispatch."""
    kept, read = [], Recorder.read
    monkeypatch.setattr(Recorder, "read", lambda *given: (read(*given), kept.append(np.ones(1 << 15))))
    assert soak(engine, 100, 50) > GROWTH
