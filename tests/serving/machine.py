"""The programs over the hash network with the plainest host there can be: what a scheduler does, by hand and at will.

Every emitted token is compared with the oracle's where it is read from a log, every row where `Machine.check` is called.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.serving import pages, slots
from glmjax.serving.pages import OK, PagedCache, PageRecords, PageTable
from glmjax.serving.pool import Lease, Pool
from glmjax.serving.programs import Batch, Chunks, Guesses, Log, decode_rounds, read_chunks, verify_chain
from glmjax.serving.slots import Slots
from glmjax.serving.tree import PrefixTree
from tests.serving.hash_network import CONFIG, VOCAB, WIDTH, HashNetwork, Known, Oracle

A, G, M, W = 4, 11, 8, 5  # rows of a page, pages, pages of a sequence, slots
B, T, Z, ROUNDS = 3, 8, 6, 3  # sequences and tokens of a dispatch, pages retired or moved by it
V, DEPTHS = 5, (0, 1, 2)  # guesses of a chain; drafts of a round
NETWORK = HashNetwork()
GREEDY = SamplingState.from_params([SamplingParams(temperature=0)], [()], VOCAB)


def jitted(name: str, planted: Callable[[Any], Any] = lambda run: run) -> Any:
    """One of the programs, with what is planted in it: "read", "verify", "decode" and a depth, …"""
    kind, *depth = name.split()
    run = {"read": read_chunks, "decode": decode_rounds, "verify": verify_chain, "admit": slots.admit}
    run |= {"retire": pages.retire, "land": pages.land, "collect": pages.collect}
    donated = {"admit": 0, "retire": 0, "land": 0, "collect": ()}.get(kind, (0, 1))
    network = (NETWORK,) if donated == (0, 1) else ()
    sizes = {"num_draft": int(depth[0]), "most_rounds": ROUNDS} if depth else {}
    return jax.jit(functools.partial(planted(run[kind]), *network, **sizes), donate_argnums=donated)


PROGRAMS = {
    name: jitted(name)
    for name in ("read", "verify", *(f"decode {n}" for n in DEPTHS), "retire", "land", "collect", "admit")
}


@functools.lru_cache(4096)
def known(ids: tuple[int, ...]) -> Known:
    """What the cache should hold of these tokens."""
    return Oracle(ids).known


@dataclasses.dataclass(eq=False)
class Sequence:
    """What the host knows of one: its tokens, how many of them have rows, its leases and its slot."""

    ids: list[int]
    prompt: int
    leases: list[Lease]
    rows: int
    slot: int
    generation: int
    record: list[int] = dataclasses.field(default_factory=list)  # tokens that it must emit next
    landing: list[Lease] = dataclasses.field(default_factory=list)  # leases that wait for a transfer

    @property
    def reading(self) -> bool:
        """Its prompt has not been read to the end."""
        return len(self.ids) == self.prompt

    @property
    def room(self) -> int:
        """Tokens that it may emit in the pages it has."""
        return len(self.leases) * A - (len(self.ids) - 1)


def padded(values: list[int], size: int, filler: int = -1) -> np.ndarray:
    """An array of a fixed size, filled up."""
    return np.array([*values, *[filler] * (size - len(values))], np.int32)


class Machine:
    """Cache, slots, pool and tree.

    Args:
        programs: what is dispatched.
    """

    def __init__(self, programs: Mapping[str, Any] = PROGRAMS) -> None:
        self._programs = programs
        cache = PagedCache.create(CONFIG, G, A, jnp.float32, tail_dtype=jnp.float32, mtp=True)
        self.cache: PagedCache = jax.tree.map(  # nobody may count on what a new page holds
            lambda array: jnp.full_like(array, jnp.nan) if array.dtype == jnp.float32 else array, cache
        )
        self.slots = Slots.create(W, WIDTH, VOCAB, jnp.float32)
        self.pool = Pool(G)
        self.tree = PrefixTree(self.pool, A)
        self.running: list[Sequence] = []
        self.generations = [0] * W
        self.faults: list[int] = []
        self.counts: Counter[str] = Counter()  # programs run, tokens compared

    def start(self, ids: list[int], *, matched: bool = True, record: Any = ()) -> Sequence | None:
        """Admit a sequence with what the tree has of it; None where there is no slot or no page for it."""
        free = sorted(set(range(W)) - {sequence.slot for sequence in self.running})
        found = self.tree.match(ids) if matched else []
        self.pool.share(found)
        wanted = -(-(len(ids) + 1) // A) - len(found)
        if not free or len(found) + wanted > M or not self._make_room(wanted):
            self.pool.release(found)
            return None
        slot = free[0]
        self.generations[slot] += 1
        leases = [*found, *self.pool.lease(wanted)]
        sequence = Sequence(list(ids), len(ids), leases, len(found) * A, slot, self.generations[slot], list(record))
        self.slots = self._run("admit", self.slots, np.int32(slot), np.int32(sequence.generation), GREEDY)
        self.running.append(sequence)
        return sequence

    def grow(self, sequence: Sequence, pages_more: int) -> bool:
        """Lease more pages for it."""
        fits = len(sequence.leases) + pages_more <= M and self._make_room(pages_more)
        sequence.leases += self.pool.lease(pages_more) if fits else []
        return fits

    def read(self, sequences: list[Sequence], tokens: int = T) -> Log:
        """One chunk of each prompt, of whole pages but for the last."""
        chunk = max(tokens // A, 1) * A
        begins = [sequence.rows for sequence in sequences]
        pieces = [sequence.ids[begin : begin + chunk] for sequence, begin in zip(sequences, begins, strict=True)]
        final = [
            begin + len(piece) == sequence.prompt
            for begin, piece, sequence in zip(begins, pieces, sequences, strict=True)
        ]
        chunks = Chunks(
            ids_BT=np.stack([*(padded(piece, T, 0) for piece in pieces), *[padded([], T, 0)] * (B - len(pieces))]),
            begin_B=padded(begins, B),
            count_B=padded([len(piece) for piece in pieces], B, 0),
            final_B=padded(final, B, False).astype(bool),
            first_B=padded([(sequence.record or [-1])[0] for sequence in sequences], B),
            target_BT=np.full((B, T), -1, np.int32),
        )
        self.cache, self.slots, log = self._run("read", self.cache, self.slots, self._batch(sequences), chunks)
        for b, (sequence, piece) in enumerate(zip(sequences, pieces, strict=True)):
            if self._took_part(log, b):
                sequence.rows += len(piece)
                emitted, drawn = Oracle(sequence.ids).along(sequence.record[:1], forced=True)
                self._emitted(sequence, log, b, [emitted[:1]] if final[b] else [], drawn[: final[b]])
        return log

    def decode(self, sequences: list[Sequence], rounds: int = ROUNDS, drafts: int = DEPTHS[-1]) -> Log:
        """Rounds of each sequence, as far as its pages reach."""
        ends = padded([len(sequence.leases) * A for sequence in sequences], B, 0)
        given = self._batch(sequences), ends, np.int32(rounds)
        self.cache, self.slots, log = self._run(f"decode {drafts}", self.cache, self.slots, *given)
        for b, sequence in enumerate(sequences):
            if self._took_part(log, b):
                ids, wanted = list(sequence.ids), []
                for _ in range(int(log.rounds)):
                    room = len(sequence.leases) * A - (len(ids) - 1)
                    wanted.append(Oracle(ids).round(drafts)[:room] if room else [])
                    ids += wanted[-1]
                self._emitted(sequence, log, b, wanted, [True] * (len(ids) - len(sequence.ids)))
                sequence.rows = len(sequence.ids) - 1
        return log

    def verify(self, sequences: list[Sequence], guesses: list[list[int]], forced: list[bool]) -> Log:
        """One round of each sequence along tokens that the host knows, as far as its pages reach.

        Of a record nothing is drawn before its end, for what is drawn is not compared.
        """
        rooms = [min(sequence.room, V) if len(sequence.record) > V else sequence.room for sequence in sequences]
        ends = padded([len(s.ids) - 1 + room for s, room in zip(sequences, rooms, strict=True)], B, 0)
        chains = np.stack([*(padded(guess, V) for guess in guesses), *[padded([], V)] * (B - len(guesses))])
        given = self._batch(sequences), ends, Guesses(chains, padded(forced, B, False).astype(bool))
        self.cache, self.slots, log = self._run("verify", self.cache, self.slots, *given)
        for b, (sequence, room) in enumerate(zip(sequences, rooms, strict=True)):
            if self._took_part(log, b):
                emitted, drawn = Oracle(sequence.ids).along(guesses[b], forced[b])
                self._emitted(sequence, log, b, [emitted[:room]], drawn[:room])
                sequence.rows = len(sequence.ids) - 1
        return log

    def end(self, sequence: Sequence) -> None:
        """It finishes or is aborted: what is verified of it goes to the tree."""
        verified = sequence.leases[: sequence.rows // A]
        missing = [n for n, lease in enumerate(verified) if lease in sequence.landing]
        self.tree.insert(sequence.ids, verified[: missing[0]] if missing else verified)
        self.pool.release(sequence.leases)
        self.running.remove(sequence)

    def collect(self, leases: list[Lease], upto: list[int]) -> tuple[PageRecords, np.ndarray]:
        """Records of pages."""
        padding = [0] * (Z - len(leases))
        records, ok_Z = self._run(
            "collect",
            self.cache,
            padded([lease.page for lease in leases], Z),
            padded([lease.version for lease in leases], Z),
            np.array([*upto, *padding], np.int32),
        )
        return records, np.asarray(ok_Z)[: len(leases)]

    def land(self, leases: list[Lease], records: PageRecords) -> np.ndarray:
        """Records into pages, one for each lease."""
        page_Z = padded([lease.page for lease in leases], Z)
        version_Z = padded([lease.version for lease in leases], Z)
        self.cache, ok_Z = self._run("land", self.cache, page_Z, version_Z, records)
        return np.asarray(ok_Z)[: len(leases)]

    def retire(self) -> None:
        """Tell the device of pages that nobody holds."""
        self.cache = self._run("retire", self.cache, padded(self.pool.retire(Z), Z))

    def steal(self, lease: Lease) -> None:
        """A fault: a page is retired and free while its one holder still counts on it."""
        assert self.pool.references(lease) == 1
        self.cache = self._run("retire", self.cache, padded([lease.page], Z))
        self.pool._versions[lease.page] += 1
        self.pool._references[lease.page] = 0
        self.pool._free.appendleft(lease.page)

    def check(self) -> None:
        """Host and device agree."""
        self.pool.check([*(sequence.leases for sequence in self.running), self.tree])
        self.tree.check()
        np.testing.assert_array_equal(self.cache.version_G, self.pool._versions)
        ready = np.asarray(self.cache.ready_G)
        assert all(ready[lease.page] == A for lease in self.tree), "a page of the tree is not full"
        for sequence in self.running:
            for n, lease in enumerate(sequence.leases):
                if lease not in sequence.landing:
                    assert ready[lease.page] == np.clip(sequence.rows - n * A, 0, A), "rows differ from what is ready"
        for ids, leases, _ in self.tree.paths():
            self._check_rows(ids, leases)
        for sequence in self.running:
            if sequence.rows and not sequence.landing:
                self._check_rows(tuple(sequence.ids[: sequence.rows]), sequence.leases)

    def _check_rows(self, ids: tuple[int, ...], leases: Several[Lease]) -> None:
        """Pages hold what they should of these tokens, whether or not anybody has looked at it yet."""
        page_M = [lease.page for lease in leases]
        wanted, tail_MD = known(ids), np.asarray(self.cache.tail_GD)[page_M]
        for rows, wanted_LSC in (
            (self.cache.latents, wanted.latents_LSR),
            (self.cache.index_keys, wanted.index_keys_LSJ),
        ):
            found_LMAC = np.asarray(rows.values_LGAC)[:, page_M]
            found_LSC = found_LMAC.reshape(len(found_LMAC), -1, found_LMAC.shape[-1])[
                :, : len(ids), : wanted_LSC.shape[-1]
            ]
            np.testing.assert_array_equal(found_LSC, wanted_LSC, "a wrong row")
        np.testing.assert_array_equal(tail_MD[: len(ids) // A], wanted.hidden_SD[A - 1 :: A], "a wrong tail")

    def _run(self, name: str, *given: Any) -> Any:
        self.counts[name] += 1
        return self._programs[name](*given)

    def _make_room(self, wanted: int) -> bool:
        if wanted > self.pool.free + self.pool.retiring:
            self.tree.evict(wanted - self.pool.free - self.pool.retiring)
        while wanted > self.pool.free and self.pool.retiring:
            self.retire()
        return wanted <= self.pool.free

    def _batch(self, sequences: list[Sequence]) -> Batch:
        tables = [[lease.page for lease in sequence.leases] for sequence in sequences]
        versions = [[lease.version for lease in sequence.leases] for sequence in sequences]
        return Batch(
            slot_B=padded([sequence.slot for sequence in sequences], B),
            generation_B=padded([sequence.generation for sequence in sequences], B),
            table=PageTable(
                np.stack([padded(row, M) for row in (tables + [[]] * B)[:B]]),
                np.stack([padded(row, M) for row in (versions + [[]] * B)[:B]]),
            ),
            stop_BU=np.full((B, 1), -1, np.int32),
            retire_Z=padded(self.pool.retire(Z), Z),
            scored=np.array(False),
        )

    def _took_part(self, log: Log, b: int) -> bool:
        self.faults.append(int(log.fault_B[b]))
        self.counts["faults"] += self.faults[-1] != OK
        return self.faults[-1] == OK

    def _emitted(self, sequence: Sequence, log: Log, b: int, wanted: list[list[int]], drawn: list[bool]) -> None:
        tokens = [token for emitted in wanted for token in emitted]
        assert log.tokens_BS[b, : len(tokens) + 1].tolist() == [*tokens, -1][: log.tokens_BS.shape[1]], "a wrong token"
        assert log.count_ZB[: len(wanted), b].tolist() == list(map(len, wanted)), "other drafts were accepted"
        assert (log.gap_BS[b, : len(tokens)] == 0).tolist() == drawn, "gaps do not tell what would have been drawn"
        sequence.ids += tokens
        sequence.record = sequence.record[len(tokens) :]
        self.counts["tokens"] += len(tokens)
