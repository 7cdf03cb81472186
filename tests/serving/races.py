"""Everything that happens to pages, in any order, through the real programs.

Sequences start, are read, decoded with more drafts or fewer, led along guesses, confirmed, ended and aborted; pages are
shared, evicted, retired, offloaded, transferred and land late; and pages are taken away behind their holders' backs.
`Machine` compares every token with the oracle's, and every row.
"""

from collections import Counter
from typing import ClassVar

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np

from glmjax.serving.pages import OK, STALE, UNREADY
from tests.serving.hash_network import Oracle
from tests.serving.machine import DEPTHS, PROGRAMS, ROUNDS, A, B, Machine, T, V, W, Z

few = st.sampled_from([1, 2, 500])  # tokens, so that many prompts begin alike
prompts = st.lists(few, min_size=1, max_size=4 * A)


def chosen(sequences):
    """Up to B of them."""
    return st.lists(st.sampled_from(sequences), min_size=1, max_size=B, unique_by=id)


class Races(stateful.RuleBasedStateMachine):
    """See the module."""

    programs = PROGRAMS
    counts: ClassVar = Counter()  # all examples: steps taken, programs run, tokens compared

    def __init__(self):
        super().__init__()
        self.machine = Machine(self.programs)
        self.store = {}  # what has been offloaded: tokens up to the page's end → its record
        self.transfers = []  # (lease, tokens) under way

    @stateful.initialize(prompts=st.lists(prompts, min_size=1, max_size=W))
    def begin(self, prompts):
        for ids in prompts:
            self.start(ids, matched=True)

    @stateful.rule(ids=prompts, matched=st.booleans())
    def start(self, ids, matched):
        self.machine.start(ids, matched=matched)

    @stateful.precondition(lambda self: self.reading())
    @stateful.rule(data=st.data(), tokens=st.sampled_from([A, T]))
    def read(self, data, tokens):
        some = data.draw(chosen(self.reading()))
        self.told(some, self.machine.read(some, tokens))

    @stateful.precondition(lambda self: self.able())
    @stateful.rule(
        data=st.data(),
        depths=st.lists(st.sampled_from(DEPTHS), min_size=1, max_size=4),
        rounds=st.integers(1, ROUNDS),
        more=st.integers(0, 2),
    )
    def decode(self, data, depths, rounds, more):
        """A dispatch at each depth, in any order."""
        for depth in depths:
            if some := self.some_decoding(data, more):
                self.told(some, self.machine.decode(some, rounds, depth))
                self.machine.check()

    @stateful.precondition(lambda self: self.able())
    @stateful.rule(data=st.data(), more=st.integers(0, 2))
    def guess(self, data, more):
        """Guesses, the first of them right, for some; for others what they are made to say, right or not."""
        if some := self.some_decoding(data, more):
            guesses, forced = [], []
            for sequence in some:
                right, others = data.draw(st.integers(0, V)), data.draw(st.lists(few, max_size=V))
                guesses.append([*Oracle(sequence.ids).following(right), *others][:V])
                forced.append(data.draw(st.booleans()))
            self.told(some, self.machine.verify(some, guesses, forced))

    @stateful.precondition(lambda self: self.decoding())
    @stateful.rule(data=st.data(), garbled=st.booleans())
    def suspect(self, data, garbled):
        """Prompt and output are read again on other pages, where the output is confirmed; it may not be right."""
        sequence = data.draw(st.sampled_from(self.decoding()))
        prompt, record = sequence.ids[: sequence.prompt], sequence.ids[sequence.prompt :]
        if garbled:
            record[data.draw(st.integers(0, len(record) - 1))] = data.draw(few)
        self.machine.tree.remove(sequence.leases)
        self.machine.pool.release(sequence.leases)
        self.machine.running.remove(sequence)
        again = self.machine.start(prompt, matched=False, record=record)
        while again in self.machine.running and again.record:
            if again.reading:
                self.told([again], self.machine.read([again]))
            elif again.room or self.machine.grow(again, 1):
                self.told([again], self.machine.verify([again], [again.record[:V]], [True]))
            else:
                self.machine.end(again)

    def reading(self):
        return [s for s in self.machine.running if s.reading]

    def decoding(self):
        return [s for s in self.machine.running if not s.reading]

    def able(self):
        return [s for s in self.machine.running if not s.landing]

    def some_decoding(self, data, more):
        """Sequences that decode, with more pages perhaps; whoever has not been read is read if there is nobody else."""
        while not self.decoding() and (able := self.able()):
            self.told(able[:B], self.machine.read(able[:B]))
        some = data.draw(chosen(self.decoding())) if self.decoding() else []
        for sequence in some:
            self.machine.grow(sequence, more)
        return some

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
    @stateful.rule(data=st.data(), offloaded=st.booleans())
    def end_or_abort(self, data, offloaded):
        sequence = data.draw(st.sampled_from(self.machine.running))
        if offloaded:
            self.offload(sequence)
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

    def offload(self, sequence):
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
        waits = self.machine.pool.versions[lease.page] == lease.version  # for its owner, or to be retired
        assert bool(ok[-1]) == waits >= bool(owners), "landed at another's, or was dropped with an owner"
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
        self.machine.counts["steps"] += 1

    def teardown(self):
        self.machine.counts["steps"] -= 1  # the beginning is none
        self.counts.update(self.machine.counts)


def race(machine=Races, **settings):
    """Many histories, or until one of them goes wrong."""
    settings = {"max_examples": 50, "stateful_step_count": 40, "deadline": None} | settings
    stateful.run_state_machine_as_test(machine, settings=hypothesis.settings(**settings))
