"""The load benchmark sends what it says when it says, and finds what is wrong, lost or somebody else's."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serve.targets import Seen, Worker
from benchmarks.serve.workload import Asked, arrivals, workload
from benchmarks.serve_load import check, closed_loop, open_loop
from tests.worker.running import PROMPT

NOWHERE = Path("nowhere")


def test_a_workload_is_its_seeds():
    assert workload(20, seed=1) == workload(20, seed=1) != workload(20, seed=2)


def test_lengths_are_those_of_a_chat():
    asked = workload(400, longest=(900, 60))
    assert max(len(one.text) for one in asked) == 900
    assert {min(one.new_tokens for one in asked), max(one.new_tokens for one in asked)} <= {*range(4, 9), 60}
    assert 20 < np.median([one.new_tokens for one in asked]) < 45
    assert len({one.text for one in asked}) == 400
    assert len({one.text[:100] for one in workload(400)}) < 100  # many share how they begin
    assert 0.6 < np.mean([one.stream for one in asked]) < 0.9


def test_arrivals_do_not_come_in_step():
    seconds = arrivals(4000, rate=50.0)
    gaps = np.diff(seconds)
    assert 1 / np.mean(gaps) == pytest.approx(50.0, rel=0.05)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # as of an exponential distribution


def test_under_load_every_answer_is_that_of_the_request_alone(running):
    asked = [Asked(n, f"{PROMPT}{n} ", 4 + n % 5, n, n % 2 == 0) for n in range(24)]

    async def run():
        worker = Worker(running.address)
        alone = await closed_loop(worker, asked, 1)
        seen = await open_loop(worker, asked, 200.0, 0)
        assert await worker.loads() == (0, 0)
        await worker.close()
        return alone, seen

    alone, seen = asyncio.run(run())
    checked = check(asked, seen, alone, NOWHERE)
    assert (checked.same, checked.ties, checked.wrong, checked.lost) == (24, 0, 0, {})
    assert [one.tokens for one in seen] == [one.new_tokens for one in asked]
    for one, of in zip(seen, asked, strict=True):
        assert 0 < one.first <= one.whole
        assert (len(one.times) == 1) or of.stream


def test_what_is_lost_or_not_the_requests_own_is_found():
    asked = [Asked(n, "x", 2, n, False) for n in range(3)]
    alone = [Seen(0.0, answer=text) for text in ("a", "b", "c")]
    seen = [Seen(0.0, answer="a"), Seen(0.0, answer="c"), Seen(0.0, failure="UNAVAILABLE")]
    checked = check(asked, seen, alone, NOWHERE)
    assert (checked.same, checked.wrong, checked.lost) == (1, 1, {"UNAVAILABLE": 1})


def test_times_count_from_when_a_request_was_due():
    seen = Seen(10.0, times=[10.5, 10.7, 11.3], tokens=5)
    assert (seen.first, seen.whole, seen.between) == pytest.approx((0.5, 1.3, 0.2))
    assert seen.gaps == pytest.approx([0.2, 0.6])
