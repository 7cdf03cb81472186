"""What was dispatched can be dispatched again, from the beginning or from any snapshot, and the same comes of it."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from glmjax.serving import replay
from glmjax.serving.engine import Engine
from glmjax.serving.faults import FaultRates
from glmjax.serving.offload import Move
from glmjax.serving.pool import Lease
from glmjax.serving.recorder import load
from glmjax.serving.replay import Replay, _landed_first
from tests.serving.tiny import OFFLOADING, tiny

CONFIG = dataclasses.replace(
    OFFLOADING, max_num_seqs=3, pages=14, num_draft=1, max_rounds=4, recorded_dispatches=17, debug=True
)


def prompt(n, length):
    return np.random.default_rng(n).integers(0, 16, length).tolist()


def serve(config, folder):
    """Requests of all kinds, and recordings at several moments."""
    found = []
    with Engine(tiny(), config) as engine:
        for batch in range(3):
            streams = [
                engine.generate(
                    prompt(n % 5, 9 + 6 * (n % 5)),
                    temperature=1.5 * (n % 2),
                    seed=n,
                    max_new_tokens=6 + 6 * (n % 4),
                    presence_penalty=0.5 * (n % 3),
                    repetition_penalty=1.2,
                    logit_bias={3: 0.5},
                )
                for n in range(12 * batch, 12 * batch + 12)
            ]
            [stream.finish() for stream in streams[:8]]
            engine.record(folder / f"{batch}.json.gz")
            [stream.finish() for stream in streams[8:]]
            header, recordings = load(folder / f"{batch}.json.gz")
            found += recordings
        return engine.stats(), header, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def recorded(folder):
    return serve(CONFIG, folder)


def test_a_replay_gives_the_recorded_tokens_and_compiles_nothing(recorded, compiled_once):
    _, header, recordings = recorded
    assert any(recording.snapshot.slots for recording in recordings)
    before = len(compiled_once)
    replay = Replay(tiny(), header)
    parts = [again for recording in recordings for again in replay.run(recording)]
    assert len(compiled_once) == before
    assert all(again.same for again in parts), [again for again in parts if not again.same]
    assert sum(len(again.tokens) for again in parts) > 100


def test_recordings_hold_pages_that_came_from_the_hosts_memory(recorded):
    *_, recordings = recorded
    assert any(move.ids for of in recordings for flight in of.flights for move in flight.plan.moves)


def test_what_was_there_before_is_landed_whether_it_is_collected_again_or_not(recorded):
    """A page that was let go of as the recording began has nobody whose tokens tell what it held."""
    _, header, recordings = recorded
    recording = next(of for of in recordings if any(_landed_first([flight.plan for flight in of.flights])))
    first, *others = recording.flights
    [landing, *_] = _landed_first([flight.plan for flight in recording.flights])
    empty = len(recording.snapshot.versions) - 1
    gone = Move((Lease(empty, recording.snapshot.versions[empty] + 1),), landing.prefixes[:1])
    first = dataclasses.replace(first, plan=dataclasses.replace(first.plan, moves=(gone, *first.plan.moves)))
    parts = list(Replay(tiny(), header).run(dataclasses.replace(recording, flights=[first, *others])))
    assert all(again.same for again in parts)


def test_another_model_is_told_apart(recorded):
    """A replay can fail, and goes on: with one token of a prompt changed, other tokens come."""
    _, header, recordings = recorded
    replay, longest = Replay(tiny(), header), max(len(recording.flights) for recording in recordings)
    for recording in recordings:
        flights = [
            dataclasses.replace(flight, plan=dataclasses.replace(flight.plan, chunks=_changed(flight.plan.chunks)))
            for flight in recording.flights
        ]
        parts = list(replay.run(dataclasses.replace(recording, flights=flights)))
        assert len(parts) == sum(len(flight.requests) for flight in flights)
        if len(flights) == longest:  # one of a few, which nobody has read yet, has nothing to differ from
            assert not all(again.same for again in parts)


def _changed(chunks):
    return None if chunks is None else dataclasses.replace(chunks, ids_BT=(chunks.ids_BT + 1) % 16)


def test_a_race_comes_again(tmp_path):
    """Without versions a late landing spoils tokens; the recording spoils the same ones."""
    faults = FaultRates(late_landing=0.5, versioned=False)
    stats, header, recordings = serve(dataclasses.replace(CONFIG, faults=faults, recorded_dispatches=10_000), tmp_path)
    assert stats.faults["late_landing"]
    assert all(again.same for again in Replay(tiny(), header).run(recordings[-1]))


def test_what_is_no_recording_is_refused(tmp_path):
    (tmp_path / "x").write_text("{}")
    with pytest.raises(ValueError, match="not a recording"):
        load(tmp_path / "x")


# The command line


@pytest.fixture
def told(recorded, folder, monkeypatch, capsys):
    """Status and words of ``python -m glmjax.serving.replay``, of the last recording unless it is told another."""
    monkeypatch.setattr(replay, "load_model", lambda path, **fields: tiny())
    monkeypatch.setattr(replay, "compilation_cache", lambda folder: None)  # it is the whole process's

    def run(*flags, file="2.json.gz"):
        status = replay.main([str(folder / file), *map(str, flags)])
        out, err = capsys.readouterr()
        return status, out + err

    return run


def test_the_command_line_tells_how_much_came_again(told, recorded):
    *_, recordings = recorded
    parts = sum(len(flight.requests) for flight in recordings[-1].flights)
    assert told() == (0, f"{parts} parts of dispatches replayed, 0 came out differently\n")


def test_the_command_line_tells_every_dispatch_of_a_request(told, recorded):
    *_, recordings = recorded
    flights = recordings[-2].flights
    request = next(request for flight in reversed(flights) for request in flight.requests)
    status, words = told("--before", "--request", request)
    assert status == 0
    assert words.count(f": request {request} ") == sum(request in flight.requests for flight in flights)


def test_the_command_line_tells_what_came_out_differently(told, folder):
    saved = json.loads(gzip.decompress((folder / "2.json.gz").read_bytes()))
    flights = saved["recordings"][-2]["flights"]
    flight = next(of for of in flights if of["log"] and of["plan"]["rounds"] and of["log"]["tokens_BS"][0][0] >= 0)
    flight["log"]["tokens_BS"][0][0] ^= 1
    (folder / "changed.json.gz").write_bytes(gzip.compress(json.dumps(saved).encode()))
    status, words = told("--before", file="changed.json.gz")
    assert status == 1
    assert f"recorded   [{flight['log']['tokens_BS'][0][0]}" in words
    assert "1 came out differently" in words


@pytest.mark.parametrize(
    ("flags", "file", "message"),
    [
        (["--request", "-1"], "2.json.gz", "request -1 is not in the recording, which has requests"),
        ([], "nothing.json.gz", "is not a recording"),
        ([], "words.txt", "is not a recording"),
        ([], "older.json.gz", "has format 1, this version reads 2; use the one that recorded it"),
        ([], "hooked.json.gz", "recorded with hooks, which are code and not in the file"),
    ],
)
def test_the_command_line_refuses_what_cannot_be_replayed(told, folder, flags, file, message):
    (folder / "words.txt").write_text("{}")
    saved = json.loads(gzip.decompress((folder / "2.json.gz").read_bytes()))
    hooked = saved | {"header": saved["header"] | {"hooks": True}}
    (folder / "hooked.json.gz").write_bytes(gzip.compress(json.dumps(hooked).encode()))
    del saved["format"]
    (folder / "older.json.gz").write_bytes(gzip.compress(json.dumps(saved).encode()))
    status, words = told(*flags, file=file)
    assert status == 2
    assert message in words
    assert "Traceback" not in words
