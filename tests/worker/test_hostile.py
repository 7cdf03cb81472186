"""Among clients that are broken or hostile others get what they always get, and nothing is left of it."""

import random
from collections import Counter

import pytest

from benchmarks.hostile.attack import Source
from benchmarks.hostile.attacks import attacks
from benchmarks.hostile.report import Neighbour, Process, Report, Tally
from benchmarks.serve_hostile import bombard, source_of, valid_requests

REQUESTS = 150


@pytest.fixture(scope="module")
def report(running, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    source = source_of(running.address, 4, folder, patience=0.1, depth=1000)
    return bombard(
        running.address,
        attacks(source, REQUESTS),
        total=REQUESTS,
        clients=4,
        folder=folder,
        valid=valid_requests()[::3],
    )


def test_every_request_is_answered_or_refused_for_what_it_is(report):
    assert report.tally.statuses.total() == REQUESTS
    assert len({kind for kind, _ in report.tally.statuses}) > 12, report.table()
    assert report.unexpected == []


def test_neighbours_get_what_they_get_alone(report):
    assert all(one.answers > 0 for one in report.neighbours)
    assert [(one.different, one.failed) for one in report.neighbours] == [(0, Counter())] * 2


def test_nothing_is_left(running, report):
    assert report.left == ()
    assert not len(running.worker.service.live)
    stats = running.engine.stats()
    assert (stats.running, stats.waiting, stats.held_pages) == (0, 0, 0)
    assert stats.free_pages + stats.cached_pages == stats.pages


# The benchmark itself


def test_a_seed_fixes_the_requests(tmp_path):
    first, again, other = ([*attacks(Source(random.Random(seed), 320, 192, tmp_path), 60)] for seed in (1, 1, 2))
    assert first == again != other
    assert sum(map(len, first)) == sum(map(len, other)) == 60


def told(statuses=(), left=(), **neighbour):
    tally = Tally(len(statuses))
    for status in statuses:
        tally.add("prompts", status, "so it is")
    tally.close()
    process = Process(1.0, 2, 3)
    return Report(tally, (Neighbour(**{"answers": 1} | neighbour),), left, (process, process), 1.0)


def test_a_report_says_what_is_wrong():
    fine = told(["answered", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"])
    assert (fine.unexpected, fine.wrong) == ([], [])
    assert "INVALID_ARGUMENT" in str(fine)
    assert told(["INTERNAL", "INTERNAL", "UNKNOWN"]).unexpected == [
        "     2 prompts: INTERNAL: so it is",
        "     1 prompts: UNKNOWN: so it is",
    ]
    for bad in (
        told(left=("5 more threads than before",)),
        told(different=1),
        told(failed=Counter({"UNAVAILABLE": 1})),
        told(answers=0),
    ):
        assert len(bad.wrong) == 1
        assert bad.wrong[0] in str(bad)
