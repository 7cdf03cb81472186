"""Versions and verdicts: a sequence whose pages are not as it was granted them takes no part, and nothing is lost."""

import dataclasses

import numpy as np
import pytest

from glmjax.serving.pages import OK, STALE, UNREADY
from glmjax.serving.pool import Lease
from tests.serving.machine import A, Machine

TEXT = [7, 1, 800, 42, 42, 900, 3, 11, 5, 6]


@pytest.fixture
def machine():
    return Machine()


def begun(machine, ids=TEXT):
    """A sequence whose prompt has been read."""
    sequence = machine.start(ids)
    while sequence.reading:
        machine.read([sequence])
    return sequence


@pytest.mark.parametrize("length", [1, A - 1, A, A + 1, 2 * A, 2 * A + 1, 5 * A])
def test_a_prompt_of_any_length_is_read_and_continued(machine, length):
    sequence = begun(machine, (TEXT * 2)[:length])
    machine.grow(sequence, 2)
    for _ in range(4):
        machine.decode([sequence])
    assert len(sequence.ids) - 1 == len(sequence.leases) * A  # as far as its pages reach
    machine.check()


def test_several_sequences_in_one_dispatch_do_not_notice_each_other(machine):
    sequences = [machine.start(TEXT[: 3 + 2 * n]) for n in range(3)]
    machine.read(sequences)
    for sequence in sequences:
        machine.grow(sequence, 1)
    machine.decode([sequences[0]])
    machine.decode(sequences)
    machine.decode([sequences[2], sequences[1]])
    machine.check()


def test_a_whole_prompt_in_the_tree_needs_no_forward(machine):
    """The tail of its last page gives the first token."""
    ids = TEXT[: 2 * A]
    machine.end(begun(machine, ids))
    sequence = machine.start(ids)
    assert sequence.rows == 2 * A
    machine.read([sequence])
    machine.grow(sequence, 1)
    machine.decode([sequence])
    machine.check()


def test_what_was_decoded_is_found_by_a_prompt_that_goes_on_from_it(machine):
    sequence = begun(machine)
    machine.grow(sequence, 2)
    machine.decode([sequence])
    machine.decode([sequence])
    machine.end(sequence)
    again = machine.start([*sequence.ids, 9])
    assert again.rows == (len(sequence.ids) - 1) // A * A
    machine.read([again])
    machine.decode([again])
    machine.check()


def test_a_page_that_is_only_to_be_written_counts_too(machine):
    """Else rows would be dropped and the reads after them find another's."""
    sequence = begun(machine)
    machine.grow(sequence, 1)
    machine.steal(sequence.leases[-1])
    before = list(sequence.ids)
    log = machine.decode([sequence])
    assert int(log.fault_B[0]) == STALE
    assert (np.asarray(log.tokens_BS) == -1).all()
    assert sequence.ids == before


def test_a_recycled_page_is_refused_whatever_its_new_owner_wrote(machine):
    victim = begun(machine, TEXT[:7])
    machine.steal(victim.leases[0])
    other = begun(machine, [900, 5, 5, 2, 1])
    assert other.leases[0].page == victim.leases[0].page
    log = machine.decode([victim, other])
    assert log.fault_B.tolist()[:2] == [STALE, OK]
    assert len(victim.ids) == 8


def test_another_generation_finds_an_idle_slot(machine):
    """A slot that has changed hands emits nothing for its old owner."""
    old = begun(machine)
    machine.end(old)
    new = machine.start(TEXT[:5])
    assert new.slot == old.slot
    machine.running.append(old)
    log = machine.decode([old])
    assert int(log.count_ZB.sum()) == 0
    machine.running.remove(old)
    machine.read([new])
    machine.decode([new])


def moved(machine, ids):
    """A sequence that waits for its first two pages, and their records."""
    source = begun(machine, ids)
    records, ok = machine.collect(source.leases[:2], [A, A])
    assert ok.all()
    machine.end(source)
    machine.tree.clear()
    sequence = machine.start(ids)
    sequence.landing, sequence.rows = sequence.leases[:2], 2 * A
    return sequence, records


def test_what_has_not_landed_is_not_read(machine):
    sequence, records = moved(machine, TEXT)
    assert int(machine.read([sequence]).fault_B[0]) == UNREADY
    assert machine.land(sequence.leases[:2], records).all()
    sequence.landing = []
    assert int(machine.read([sequence]).fault_B[0]) == OK
    machine.decode([sequence])
    machine.check()


def test_what_lands_late_in_a_recycled_page_is_dropped(machine):
    sequence, records = moved(machine, TEXT)
    late = sequence.leases[:2]
    machine.pool.release(sequence.leases)
    machine.running.remove(sequence)
    machine.retire()
    machine.pool._free.rotate(len(sequence.leases))  # those just retired are next
    other = machine.start([3] * 30)
    machine.read([other])
    assert {lease.page for lease in late} & {lease.page for lease in other.leases}
    assert not machine.land(late, records).any()
    while other.reading:
        machine.read([other])
    machine.decode([other])
    machine.check()


def test_what_lands_twice_or_on_rows_of_its_own_is_dropped(machine):
    sequence, records = moved(machine, TEXT)
    assert machine.land(sequence.leases[:2], records).tolist() == [True, True]
    assert machine.land(sequence.leases[:2], records).tolist() == [False, False]


def test_a_lease_that_holds_no_longer_collects_nothing(machine):
    sequence = begun(machine)
    leases = sequence.leases[:2]
    machine.steal(leases[0])
    records, ok = machine.collect(leases, [A, A])
    assert ok.tolist() == [False, True]
    assert records.ready_Z.tolist()[:2] == [0, A]


def test_more_rows_than_are_ready_are_not_collected(machine):
    sequence = begun(machine, TEXT[: A + 2])
    _, ok = machine.collect(sequence.leases[:2], [A, 3])
    assert ok.tolist() == [True, False]


def test_rows_that_are_not_the_sequences_own_are_stale(machine):
    """A page with more in it than its holder counts on has had another writer."""
    sequence = begun(machine, TEXT[: A + 2])
    page = sequence.leases[1].page
    machine.cache = dataclasses.replace(machine.cache, ready_G=machine.cache.ready_G.at[page].set(A))
    assert int(machine.decode([sequence]).fault_B[0]) == STALE


def test_out_of_room_a_sequence_waits_and_goes_on(machine):
    sequence = begun(machine, TEXT[: A - 1])
    machine.decode([sequence])
    assert len(sequence.ids) == A + 1  # its one page is full
    assert int(machine.decode([sequence]).rounds) == 0
    machine.grow(sequence, 1)
    machine.decode([sequence])
    assert len(sequence.ids) > A + 1
    machine.check()


def test_leases_out_of_range_touch_nothing(machine):
    _, records = moved(machine, TEXT)
    assert not machine.land([Lease(10_000, 0), Lease(-5, 0)], records).any()
    assert not machine.collect([Lease(10_000, 0), Lease(-5, 0)], [1, 1])[1].any()
    machine.check()
