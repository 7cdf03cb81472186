"""Recordings are written where somebody may want them, and not for ever."""

import dataclasses

import pytest

from glmjax.serving.engine import Engine
from glmjax.serving.recorder import load
from glmjax.worker.flight_files import MOST_FILES, FlightFiles
from tests.serving.tiny import ENGINE, tiny


@pytest.fixture(scope="module")
def engine():
    with Engine(tiny(), dataclasses.replace(ENGINE, recorded_dispatches=10)) as engine:
        engine.generate([1, 2, 3], max_new_tokens=4, temperature=0).finish()
        yield engine


def test_a_garbled_output_is_recorded_once(engine, tmp_path):
    files = FlightFiles(engine, tmp_path / "flights")
    assert files.look() is None
    engine._running.counts["restarts"] += 1
    path = files.look()
    assert path.name.endswith("-garbled.json.gz")
    assert files.look() is None
    _, recordings = load(path)
    assert recordings[-1].flights


def test_the_oldest_files_make_room(engine, tmp_path):
    files = FlightFiles(engine, tmp_path)
    written = [files.write("asked") for _ in range(MOST_FILES + 3)]
    assert sorted(tmp_path.iterdir()) == sorted(written)[3:]


def test_a_disk_that_takes_nothing_costs_no_more_than_the_file(engine, tmp_path, caplog):
    files = FlightFiles(engine, tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert files.write("asked") is None
    assert "no recording was written" in caplog.text
    assert engine.generate([1, 2], max_new_tokens=2).finish()
