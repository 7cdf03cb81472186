"""A worker for all tests of a file."""

import pytest

from tests.worker.running import Running


@pytest.fixture(scope="module")
def running():
    running = Running().ready()
    yield running
    running.leave()
    assert running.closed() == 0
