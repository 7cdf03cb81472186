"""What was dispatched can be dispatched again, from the beginning or from any snapshot, and the same comes of it."""

import dataclasses

import numpy as np
import pytest

from glmjax.serving.engine import Engine
from glmjax.serving.faults import FaultRates
from glmjax.serving.recorder import load
from glmjax.serving.replay import Replay
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
def recorded(tmp_path_factory):
    return serve(CONFIG, tmp_path_factory.mktemp("replay"))


def test_a_replay_gives_the_recorded_tokens(recorded):
    _, header, recordings = recorded
    assert any(recording.snapshot.slots for recording in recordings)
    replay = Replay(tiny(), header)
    parts = [again for recording in recordings for again in replay.run(recording)]
    assert all(again.same for again in parts), [again for again in parts if not again.same]
    assert sum(len(again.tokens) for again in parts) > 100


def test_recordings_hold_pages_that_came_from_the_hosts_memory(recorded):
    *_, recordings = recorded
    assert any(move.ids for of in recordings for flight in of.flights for move in flight.plan.moves)


def test_another_model_is_told_apart(recorded):
    """A replay can fail: with one token of a prompt changed, other tokens come."""
    _, header, recordings = recorded
    longest = max(recordings, key=lambda recording: len(recording.flights))
    flights = [
        dataclasses.replace(flight, plan=dataclasses.replace(flight.plan, chunks=_changed(flight.plan.chunks)))
        for flight in longest.flights
    ]
    parts = Replay(tiny(), header).run(dataclasses.replace(longest, flights=flights))
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
