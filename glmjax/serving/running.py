"""Who waits, who runs, and what they hold: slots and pages.

A sequence's pages and slot change hands only when no log of it is unread (`settle`): whoever preempts, cancels or ends one
marks it as leaving, plans leave it out from then on, and it gives back what it has when the last of its logs is in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from glmjax.serving.config import EngineConfig
from glmjax.serving.drafting import Acceptance
from glmjax.serving.errors import DeadlineError
from glmjax.serving.events import CacheEvents
from glmjax.serving.faults import Faults
from glmjax.serving.offload import Loading, Move, Offload
from glmjax.serving.plan import Admission
from glmjax.serving.pool import Pool
from glmjax.serving.request import Request
from glmjax.serving.sequence import Leaving, Sequence
from glmjax.serving.stream import Chunk
from glmjax.serving.tree import PrefixTree, common_tokens
from glmjax.serving.waiting import Waiting

MOST_RETIRED = 256
"""Pages that a dispatch retires at most."""


class Running:
    """Requests, sequences and pages of one engine. Only the engine's thread calls it.

    Args:
        config: the engine's.
        pages: G.
        offload: where pages go that the tree lets go of.
        faults: what happens to pages on their way.
        events: what is told of the tree.

    Attributes:
        waiting: requests without a slot.
        sequences: requests with one.
        pool: who holds which page.
        tree: what is shared of them.
        counts: what has happened, for `glmjax.serving.stats.EngineStats`.
        acceptance: of all requests' drafts lately.
    """

    def __init__(
        self,
        config: EngineConfig,
        pages: int,
        offload: Offload | None = None,
        faults: Faults | None = None,
        events: CacheEvents | None = None,
    ):
        self.waiting = Waiting(
            most=config.max_queued, most_of_client=config.max_queued_per_client, ageing=config.ageing_seconds
        )
        self.counts: Counter = Counter()
        self.acceptance = Acceptance()
        self._config, self._pages, self._size = config, pages, config.page_size
        self._offload, self._faults, self._events = offload, faults or Faults(None), events or CacheEvents()
        self._begin()

    def _begin(self) -> None:
        """With an empty cache."""
        self.sequences: list[Sequence] = []
        self.pool = Pool(self._pages)
        self.tree = PrefixTree(self.pool, self._size, self._events)
        self._events.cleared()
        self._free_slots = list(range(self._config.max_num_seqs - 1, -1, -1))
        self._generations = [0] * self._config.max_num_seqs
        self._retired: list[int] = []
        if self._offload is not None:
            self._offload.begin()

    @property
    def busy(self) -> bool:
        """Whether somebody waits or runs."""
        return bool(self.sequences or len(self.waiting))

    @property
    def pressed(self) -> bool:
        """Whether somebody waits for the device. Who waits for a slot or for pages does not: no dispatch is in his way."""
        return any(s.reads for s in self.sequences)

    # Requests

    def add(self, request: Request) -> None:
        """Let a request wait, in the place that was reserved for it (`Waiting.reserve`)."""
        self.waiting.push(request)

    def end(self, request: Request, now: float, error: BaseException | None = None) -> None:
        """End a request where it is: cancelled, or with an error. One that has ended stays as it is."""
        held = [s for s in self.sequences if s.request is request and s.leaving is not Leaving.DONE]
        if not (self.waiting.remove(request) or held):
            return
        for sequence in held:
            sequence.leaving = Leaving.DONE
        if error is not None:
            request.stream.fail(error)
        for ended in (request, *request.siblings):
            ended.stream.put(Chunk((), "", ended.index, (), "cancelled", None, ended.statistics(now)))
        request.siblings.clear()

    def expire(self, now: float) -> None:
        """End those whose deadline has passed."""
        for request in [*self.waiting, *(s.request for s in self.sequences if s.leaving is not Leaving.DONE)]:
            if request.deadline is not None and request.deadline <= now:
                error = DeadlineError(
                    f"the deadline has passed, {now - request.arrived:.1f} s after the request came; "
                    f"{len(request.reply.ids)} tokens were generated; allow more time or send less"
                )
                self.end(request, now, error)

    def drop(self, error: BaseException, waiting: bool = False) -> None:
        """The cache is lost: those who run fail, and everything begins with an empty one.

        Args:
            error: what to tell them.
            waiting: tell those who wait, too.
        """
        for request in [*(s.request for s in self.sequences), *(self.waiting if waiting else ())]:
            self.waiting.remove(request)
            request.stream.fail(error)
        self._begin()

    # Slots and pages

    def flush(self) -> bool:
        """Let go of all cached pages, in the host's memory, too, if nobody waits or runs; whether that was so."""
        if self.busy:
            return False
        self.tree.clear()
        if self._offload is not None:
            self._offload.forget()
        return True

    def admit(self, now: float) -> Iterator[Admission]:
        """Who waits, in turn, as long as there are slots, and pages for all that has to be read."""
        while self._free_slots and (request := self.waiting.next(now)):
            ids = request.prompt if request.suspects else request.ids
            reuse = request.reuse and not (request.suspects or request.scoring)
            found = self.tree.match(ids, request.namespace) if reuse else []
            self.pool.share(found)
            wanted = -(-len(ids) // self._size) - len(found)
            spare = len(self.sequences)  # a page for each to grow by, so that nobody is preempted at once
            if not self.make_room(wanted + spare) and (self.sequences or not self.make_room(wanted)):
                self.pool.release(found)
                return
            self.waiting.pop(now)
            slot, rows = self._free_slots.pop(), len(found) * self._size
            self._generations[slot] += 1
            expected = tuple(request.reply.ids) if request.suspects else ()
            leases, loading = [*found, *self.pool.lease(wanted)], None
            if self._offload is not None and reuse and request.loads:
                stored = self._offload.find(ids, request.namespace, len(found))
                if stored:
                    loading = self._offload.load(stored, leases[len(found) :], now + self._config.load_seconds)
            sequence = Sequence(
                request, slot, self._generations[slot], leases, list(ids), rows, rows, 0, loading, expected
            )
            if reuse and loading is None:
                self._follow(sequence)
            self.sequences.append(sequence)
            if request.admitted is None:
                request.admitted = now
                self.counts["prompt_tokens"] += len(request.prompt)
                self._count_cached(request, rows)
            emitted = tuple(request.reply.ids[len(expected) :])
            yield Admission(slot, self._generations[slot], request.params, tuple(request.prompt), emitted, request.ends)

    def _follow(self, sequence: Sequence) -> None:
        """Find who is reading most of what a sequence would read: nobody reads it twice."""
        request, sequence.common = sequence.request, sequence.rows
        for other in self.sequences:
            shares = other.request.reuse and not other.request.suspects and other.leaving is None
            if not shares or other.request.namespace != request.namespace or other.request.priority > request.priority:
                continue
            common = common_tokens(other.ids, sequence.ids) // self._size * self._size
            if common > max(sequence.common, other.rows):
                sequence.leader, sequence.common = other, common

    def waits(self, sequence: Sequence) -> bool:
        """Whether its leader is still reading. If not, it takes what the leader has left in the prefix tree."""
        leader = sequence.leader
        if leader is None:
            return False
        if leader.leaving is None and leader.rows < sequence.common:
            return True
        sequence.leader, begin = None, sequence.sent // self._size
        found = self.tree.match(sequence.ids, sequence.request.namespace)[begin:]
        self.pool.share(found)
        self.pool.release(sequence.leases[begin : begin + len(found)])
        sequence.leases[begin : begin + len(found)] = found
        sequence.sent = sequence.rows = sequence.sent + len(found) * self._size
        if sequence.request.began is None and not sequence.request.replays:
            self._count_cached(sequence.request, len(found) * self._size)
        return False

    def land(self, now: float) -> None:
        """Pages that have come from the host's memory go where they are wanted; who has waited too long does without."""
        for sequence in self.sequences:
            if (loading := sequence.loading) is None:
                continue
            if sequence.leaving:
                sequence.loading = None
            elif loading.pages.done():
                sequence.loading = None
                self._land(sequence, loading)
            elif loading.deadline <= now:
                sequence.loading = None

    def _land(self, sequence: Sequence, loading: Loading) -> None:
        fault = self._faults.of_landing() if loading.pages.result() else None
        rows = self._offload.land(loading, sequence.ids, late=fault is not None) * self._size
        if fault == "late_landing":
            sequence.leaving, sequence.request.loads = Leaving.REPLAYED, False
            return
        sequence.sent += rows
        sequence.landed = sequence.sent if fault is None else 0
        if sequence.request.began is None and not sequence.request.replays:
            self._count_cached(sequence.request, rows)

    def _count_cached(self, request: Request, rows: int) -> None:
        request.cached += rows
        self.counts["cached_tokens"] += rows

    def moves(self) -> tuple[Move, ...]:
        """Pages that the next dispatch collects or lands."""
        return () if self._offload is None else self._offload.take()

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many tokens beyond what a sequence has been promised; whether it can emit any."""
        promised = sequence.position + sequence.promised
        more = -(-min(promised + tokens, sequence.end) // self._size) - len(sequence.leases)
        if more > 0 and not self.make_room(more):
            more = self.pool.free
        if more > 0:
            sequence.leases += self.pool.lease(more)
        if len(sequence.leases) * self._size > promised:
            return True
        if not any(s.leaving for s in self.sequences):  # whoever leaves brings pages
            self._preempt()
        return False

    def make_room(self, wanted: int) -> bool:
        """Whether so many pages can be leased now; evicts for it what nobody holds."""
        if wanted > self.pool.free:
            evicted = self.tree.evict(wanted - self.pool.free - self.pool.retiring)
            if self._offload is not None:
                self._offload.leave(evicted)
            self.retire()
        return wanted <= self.pool.free

    def retire(self) -> None:
        """Have the next dispatch retire pages that nobody holds, as many as it can."""
        self._retired += self.pool.retire(MOST_RETIRED - len(self._retired))

    def take_retired(self) -> list[int]:
        """Pages for a dispatch to retire."""
        retired, self._retired = self._retired, []
        return retired

    def settle(self) -> bool:
        """Those who leave and have no unread log give back what they have; whether anybody did."""
        settled = [s for s in self.sequences if s.leaving and not s.unread]
        for sequence in settled:
            if sequence.leaving in (Leaving.DONE, Leaving.PREEMPTED):
                self.keep(sequence)
            self.pool.release(sequence.leases)
            self.sequences.remove(sequence)
            self._free_slots.append(sequence.slot)
            if sequence.leaving is not Leaving.DONE:
                self.waiting.push_back(sequence.request)
        return bool(settled)

    def keep(self, sequence: Sequence) -> None:
        """Full, verified pages go to the prefix tree."""
        request = sequence.request
        if request.reuse and not sequence.confirming and not request.suspects:
            full = min(sequence.rows, len(request.ids)) // self._size
            self.tree.insert(request.ids, sequence.leases[:full], request.namespace)

    def suspect(self, sequence: Sequence) -> None:
        """Take a sequence's pages from the prefix tree; it will be read again on others and confirmed."""
        sequence.request.suspects = frozenset(sequence.leases)
        self.tree.remove(sequence.leases)
        sequence.leaving = Leaving.SUSPECTED

    def check(self) -> None:
        """Everything adds up.

        Raises:
            AssertionError: naming what does not.
        """
        self.pool.check([*(s.leases for s in self.sequences), self.tree])
        self.tree.check()
        slots = [*self._free_slots, *(s.slot for s in self.sequences)]
        assert sorted(slots) == list(range(self._config.max_num_seqs)), "a slot is lost or used twice"

    def _preempt(self) -> None:
        """Of the least urgent, the newest gives its pages to the others; one that has emitted since it came, if any."""
        victim = max(
            self.sequences, key=lambda s: (s.request.priority, len(s.request.ids) > len(s.ids), s.request.number)
        )
        victim.leaving = Leaving.PREEMPTED
        victim.request.preemptions += 1
        self.counts["preemptions"] += 1
