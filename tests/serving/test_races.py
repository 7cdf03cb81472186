"""Everything that happens to pages, in any order, through the real programs: no wrong token, and nothing is lost.

Sequences start, are read, decoded, ended and aborted; pages are shared, evicted, retired, offloaded, transferred and land
late; and pages are taken away behind their holders' backs. `Machine` compares every token with the oracle's.
"""

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np

from glmjax.serving.pages import OK, STALE, UNREADY
from tests.serving.hash_network import Oracle
from tests.serving.machine import ROUNDS, A, B, Machine, T, Z

few = st.sampled_from([1, 2, 500])  # tokens, so that many prompts begin alike


def test_drafts_beyond_a_sequences_pages_see_nobody_elses_rows():
    """The last row of the last page, another round: what would follow stands in no page, least of all in page 0."""
    machine = Machine()
    machine.end(machine.start([1]))  # page 0 holds what nobody knows
    sequence = machine.start([2])
    machine.read([sequence])
    machine.decode([sequence])
    assert sequence.ids == [2, *Oracle([2]).following(A)]


class Races(stateful.RuleBasedStateMachine):
    """See the module."""

    def __init__(self):
        super().__init__()
        self.machine = Machine()
        self.store = {}  # what has been offloaded: tokens up to the page's end → its record
        self.transfers = []  # (lease, tokens) under way

    def some(self, data, sequences):
        return data.draw(st.lists(st.sampled_from(sequences), min_size=1, max_size=B, unique_by=id))

    @stateful.rule(ids=st.lists(few, min_size=1, max_size=4 * A), matched=st.booleans())
    def start(self, ids, matched):
        self.machine.start(ids, matched=matched)

    @stateful.precondition(lambda self: self.machine.running)
    @stateful.rule(data=st.data(), tokens=st.sampled_from([A, T]))
    def read(self, data, tokens):
        if reading := [sequence for sequence in self.machine.running if sequence.reading]:
            self.told(some := self.some(data, reading), self.machine.read(some, tokens))

    @stateful.precondition(lambda self: self.machine.running)
    @stateful.rule(data=st.data(), rounds=st.integers(1, ROUNDS), more=st.integers(0, 2))
    def decode(self, data, rounds, more):
        if decoding := [sequence for sequence in self.machine.running if not sequence.reading]:
            some = self.some(data, decoding)
            for sequence in some:
                self.machine.grow(sequence, more)
            self.told(some, self.machine.decode(some, rounds))

    def told(self, sequences, log):
        """What an engine does about a fault: a stale sequence begins anew; one that waits goes on waiting."""
        for b, sequence in enumerate(sequences):
            fault = int(log.fault_B[b])
            if fault == UNREADY:
                assert sequence.landing, "unready without a transfer under way"
            if fault == STALE:
                self.replay(sequence)
            assert fault != OK or not sequence.landing

    def replay(self, sequence):
        self.forget_transfers(sequence)
        self.machine.pool.release([lease for lease in sequence.leases if self.machine.pool.references(lease)])
        self.machine.running.remove(sequence)
        self.machine.start(sequence.ids)

    @stateful.precondition(lambda self: self.machine.running)
    @stateful.rule(data=st.data())
    def end_or_abort(self, data):
        sequence = data.draw(st.sampled_from(self.machine.running))
        self.machine.end(sequence)  # its transfers go on, and land where somebody else may be by then

    @stateful.precondition(lambda self: any(sequence.landing for sequence in self.machine.running))
    @stateful.rule()
    def abort_a_load(self):
        """Its pages go to whoever comes next while the transfers are under way."""
        self.machine.end(next(sequence for sequence in self.machine.running if sequence.landing))
        while self.machine.pool.retiring:
            self.machine.retire()
        self.machine.pool._free.rotate(3)  # what has just been retired is next

    @stateful.rule(count=st.integers(1, 4))
    def evict(self, count):
        self.machine.tree.evict(count)

    @stateful.rule()
    def retire(self):
        self.machine.retire()

    @stateful.precondition(lambda self: self.machine.running)
    @stateful.rule(data=st.data())
    def offload(self, data):
        sequence = data.draw(st.sampled_from(self.machine.running))
        pages = sequence.leases[: min(sequence.rows // A, Z)]
        if pages and not sequence.landing:
            records, ok = self.machine.collect(pages, [A] * len(pages))
            for n in np.flatnonzero(ok):
                self.store[tuple(sequence.ids[: (n + 1) * A])] = (records, n)

    @stateful.precondition(lambda self: self.store)
    @stateful.rule(data=st.data(), more=st.lists(few, max_size=A))
    def load(self, data, more):
        """Start a sequence whose pages will come from the store."""
        ids = [*data.draw(st.sampled_from(sorted(self.store))), *more]
        full = [end for end in range(A, len(ids) + 1, A) if tuple(ids[:end]) in self.store]
        if full and full == list(range(A, full[-1] + 1, A)) and (sequence := self.machine.start(ids, matched=False)):
            sequence.landing = sequence.leases[: len(full)]
            sequence.rows = full[-1]
            self.transfers += [(lease, tuple(ids[:end])) for lease, end in zip(sequence.landing, full, strict=True)]

    @stateful.precondition(lambda self: self.transfers)
    @stateful.rule(data=st.data())
    def land(self, data):
        lease, ids = self.transfers.pop(data.draw(st.integers(0, len(self.transfers) - 1)))
        records, n = self.store[ids]
        leases = [lease._replace(page=-1)] * n + [lease]  # a record lands from its own place
        ok = self.machine.land(leases, records)
        owners = [sequence for sequence in self.machine.running if lease in sequence.landing]
        assert bool(ok[-1]) == bool(owners), "landed without an owner, or was dropped with one"
        for sequence in owners:
            sequence.landing = [other for other in sequence.landing if other != lease]

    def forget_transfers(self, sequence):
        sequence.landing = []

    @stateful.precondition(lambda self: self.machine.running)
    @stateful.rule(data=st.data())
    def take_away(self, data):
        """A fault: a page is retired behind its holders' backs; nobody may use it again, and who tries is told so."""
        sequence = data.draw(st.sampled_from(self.machine.running))
        lease = data.draw(st.sampled_from(sequence.leases))
        if self.machine.pool.references(lease) == 1 and lease not in sequence.landing:
            self.machine.steal(lease)
            if sequence.reading:
                self.told([sequence], self.machine.read([sequence]))
            else:
                self.told([sequence], self.machine.decode([sequence]))
            assert self.machine.faults[-1] == STALE

    @stateful.invariant()
    def adds_up(self):
        self.machine.check()


TestRaces = Races.TestCase
TestRaces.settings = hypothesis.settings(max_examples=30, stateful_step_count=40, deadline=None)
