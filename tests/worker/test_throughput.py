"""Tokens a second, however often and by however many it is asked for."""

import pytest

from glmjax.worker.throughput import Throughput


def test_it_is_the_growth_since_the_last_look():
    now = 100.0
    throughput = Throughput(lambda: now)
    assert throughput(0) == 0
    now += 2
    assert throughput(50) == pytest.approx(25)
    now += 10
    assert throughput(50) == 0


def test_who_asks_too_soon_is_told_the_last_rate():
    now = 0.0
    throughput = Throughput(lambda: now)
    now += 1
    assert throughput(10) == pytest.approx(10)
    now += 0.5
    assert throughput(100) == pytest.approx(10)
    now += 0.5
    assert throughput(110) == pytest.approx(100)
