"""Pages in the host's memory come back as they were, or not at all; and what races do with versions and without."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from glmjax.serving.engine import Engine
from glmjax.serving.faults import FaultRates, Faults
from glmjax.serving.records import CorruptRecordError, Store, joined, split
from glmjax.serving.tree import Prefix
from tests.serving.tiny import OFFLOADING, tiny

CONFIG = dataclasses.replace(OFFLOADING, debug=True)
ASKED = {"temperature": 1.5, "max_new_tokens": 10}
RACES = FaultRates(late_landing=0.3, forward_before_ready=0.3, retire_during_transfer=0.3)


@functools.cache
def document(n, length=40):
    return tuple(np.random.default_rng(n).integers(0, 16, length).tolist())


@functools.cache
def alone(prompt, seed):
    return tuple(tiny().generate(prompt, seed=seed, **ASKED).finish().ids)


def ask(engine, prompt, seed=0):
    [result] = engine.generate(prompt, seed=seed, **ASKED).finish()
    engine._offload.flush()  # so that what can be found does not depend on this machine's mood
    return result


# Records


@pytest.fixture(scope="module")
def engine():
    with Engine(tiny(), CONFIG) as engine:
        yield engine


@pytest.fixture(scope="module")
def stored(engine):
    """Records of a few pages."""
    for n in range(6):
        ask(engine, document(n))
    return list(engine._offload._store._records.values())


def test_a_record_is_checked_against_what_it_is_of(stored):
    one, other = stored[:2]
    assert one.checked(one.prefix) is one.page
    with pytest.raises(CorruptRecordError, match="another"):
        one.checked(other.prefix)


def test_a_changed_bit_is_found(stored):
    flipped = Faults(FaultRates(bit_flip=1.0)).of_record(stored[0])
    with pytest.raises(CorruptRecordError, match="checksum"):
        flipped.checked(flipped.prefix)
    stored[0].checked(stored[0].prefix)


def test_records_are_put_together_and_taken_apart(stored):
    pages = [record.page for record in stored[:3]]
    for page, again in zip(pages, split(joined(pages)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, page, again)


def test_a_store_drops_the_longest_unused(stored):
    one, two, three = stored[:3]
    store = Store(2 * one.size)
    store.put(one)
    store.put(two)
    store.get(one.prefix)
    store.put(three)
    assert one.prefix in store
    assert two.prefix not in store
    assert store.size == 2 * one.size


def test_a_store_keeps_nothing_that_is_larger_than_itself(stored):
    store = Store(stored[0].size - 1)
    store.put(stored[0])
    assert not len(store)
    assert store.size == 0


def test_a_prefix_depends_on_every_page_in_order():
    a, b = b"a" * 32, b"b" * 32
    assert Prefix("x").then(a).then(b) == Prefix("x").then(a).then(b)
    assert len({Prefix("x").then(a).then(b), Prefix("x").then(b).then(a), Prefix("y").then(a).then(b)}) == 3


# There and back


def test_pages_that_were_evicted_come_back_from_the_hosts_memory(engine):
    first = ask(engine, document(0))
    for n in range(1, 6):
        ask(engine, document(n))
    before = engine.stats()
    again = ask(engine, document(0))
    assert engine.stats().landed > before.landed
    assert again.statistics.cached_tokens == 40
    assert again.ids == first.ids == alone(document(0), 0)


def test_what_comes_back_is_of_the_same_salt_only(engine):
    for n in range(6):
        ask(engine, document(n))
    [result] = engine.generate(document(0), cache_salt="another", seed=0, **ASKED).finish()
    assert result.statistics.cached_tokens == 0


def test_a_load_that_takes_too_long_is_not_waited_for(engine, monkeypatch):
    monkeypatch.setattr(engine._running, "_config", dataclasses.replace(CONFIG, load_seconds=0.0))
    for n in range(6):
        ask(engine, document(n))
    assert ask(engine, document(0)).ids == alone(document(0), 0)


# Races


def wrong(rates, requests=60):
    """How many of a fault-ridden engine's outputs are wrong, and its faults and counters."""
    with Engine(tiny(), dataclasses.replace(CONFIG, faults=rates)) as engine:
        rng, count = np.random.default_rng(7), 0
        for _ in range(requests // 2):
            pair = [(document(int(n)), int(seed)) for n, seed in rng.integers(0, 6, (2, 2))]
            streams = [engine.generate(prompt, seed=seed, **ASKED) for prompt, seed in pair]
            count += sum(s.finish()[0].ids != alone(*asked) for s, asked in zip(streams, pair, strict=True))
            engine._offload.flush()
        return count, engine.stats().faults, engine.stats()


def test_versions_keep_races_from_emitting_a_token():
    count, made, stats = wrong(RACES)
    assert all(made[name] for name in ("late_landing", "forward_before_ready", "retire_during_transfer"))
    assert count == 0
    assert stats.dropped
    assert stats.replays


def test_without_versions_the_same_races_do():
    count, made, _ = wrong(dataclasses.replace(RACES, versioned=False))
    assert made["late_landing"]
    assert count > 0


def test_checksums_keep_changed_bits_from_landing():
    count, made, stats = wrong(FaultRates(bit_flip=0.5))
    assert made["bit_flip"]
    assert stats.corrupt
    assert count == 0


@pytest.mark.parametrize("fields", [{"late_landing": 1.1}, {"late_landing": 0.6, "forward_before_ready": 0.6}])
def test_impossible_rates_are_refused(fields):
    with pytest.raises(ValueError, match="within"):
        FaultRates(**fields)
