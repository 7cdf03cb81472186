"""The programs over the hash network with the plainest host there can be: what a scheduler does, by hand and at will.

Every emitted token is compared with the oracle's where it is read from a log.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.model.sampling_params import SamplingParams, SamplingState
from glmjax.serving import pages, slots
from glmjax.serving.pages import OK, PagedCache, PageRecords, PageTable
from glmjax.serving.pool import Lease, Pool
from glmjax.serving.programs import Batch, Chunks, Log, decode_rounds, read_chunks
from glmjax.serving.slots import Slots
from glmjax.serving.tree import PrefixTree
from tests.serving.hash_network import CONFIG, VOCAB, WIDTH, HashNetwork, Oracle

A, G, M, W = 4, 11, 8, 5  # rows of a page, pages, pages of a sequence, slots
B, T, Z, ROUNDS, DRAFTS = 3, 8, 6, 3, 2  # sequences and tokens of a dispatch, pages retired or moved by it
NETWORK = HashNetwork()
GREEDY = SamplingState.from_params([SamplingParams(temperature=0)], [()], VOCAB)

read = jax.jit(functools.partial(read_chunks, NETWORK), donate_argnums=(0, 1))
decode = jax.jit(functools.partial(decode_rounds, NETWORK, num_draft=DRAFTS, most_rounds=ROUNDS), donate_argnums=(0, 1))
retire, land = jax.jit(pages.retire, donate_argnums=0), jax.jit(pages.land, donate_argnums=0)
collect, admit = jax.jit(pages.collect), jax.jit(slots.admit, donate_argnums=0)


@dataclasses.dataclass(eq=False)
class Sequence:
    """What the host knows of one: its tokens, how many of them have rows, its leases and its slot."""

    ids: list[int]
    prompt: int
    leases: list[Lease]
    rows: int
    slot: int
    generation: int
    landing: list[Lease] = dataclasses.field(default_factory=list)  # leases that wait for a transfer

    @property
    def reading(self) -> bool:
        """Its prompt has not been read to the end."""
        return len(self.ids) == self.prompt


def padded(values: list[int], size: int, filler: int = -1) -> np.ndarray:
    """An array of a fixed size, filled up."""
    return np.array([*values, *[filler] * (size - len(values))], np.int32)


class Machine:
    """Cache, slots, pool and tree."""

    def __init__(self) -> None:
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

    def start(self, ids: list[int], *, matched: bool = True) -> Sequence | None:
        """Admit a sequence with what the tree has of it; None where there is no slot or no page for it."""
        free = sorted(set(range(W)) - {sequence.slot for sequence in self.running})
        found = self.tree.match(ids) if matched else []
        self.pool.share(found)
        wanted = -(-(len(ids) + 1) // A) - len(found)
        if not free or not self._make_room(wanted):
            self.pool.release(found)
            return None
        slot = free[0]
        self.generations[slot] += 1
        leases = [*found, *self.pool.lease(wanted)]
        sequence = Sequence(list(ids), len(ids), leases, len(found) * A, slot, self.generations[slot])
        self.slots = admit(self.slots, np.int32(slot), np.int32(sequence.generation), GREEDY)
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
            first_B=padded([], B),
        )
        self.cache, self.slots, log = read(self.cache, self.slots, self._batch(sequences), chunks)
        for b, (sequence, piece) in enumerate(zip(sequences, pieces, strict=True)):
            if self._took_part(log, b):
                sequence.rows += len(piece)
                self._emitted(sequence, log, b, [Oracle(sequence.ids).following(1)] if final[b] else [])
        return log

    def decode(self, sequences: list[Sequence], rounds: int = ROUNDS) -> Log:
        """Rounds of each sequence, as far as its pages reach."""
        ends = padded([len(sequence.leases) * A for sequence in sequences], B, 0)
        batch = self._batch(sequences)
        self.cache, self.slots, log = decode(self.cache, self.slots, batch, ends, np.int32(rounds))
        for b, sequence in enumerate(sequences):
            if self._took_part(log, b):
                ids, wanted = list(sequence.ids), []
                for _ in range(int(log.rounds)):
                    room = len(sequence.leases) * A - (len(ids) - 1)
                    wanted.append(Oracle(ids).round(DRAFTS)[:room] if room else [])
                    ids += wanted[-1]
                self._emitted(sequence, log, b, wanted)
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
        records, ok_Z = collect(
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
        self.cache, ok_Z = land(self.cache, page_Z, version_Z, records)
        return np.asarray(ok_Z)[: len(leases)]

    def retire(self) -> None:
        """Tell the device of pages that nobody holds."""
        self.cache = retire(self.cache, padded(self.pool.retire(Z), Z))

    def steal(self, lease: Lease) -> None:
        """A fault: a page is retired and free while its one holder still counts on it."""
        assert self.pool.references(lease) == 1
        self.cache = retire(self.cache, padded([lease.page], Z))
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
        return self.faults[-1] == OK

    def _emitted(self, sequence: Sequence, log: Log, b: int, wanted: list[list[int]]) -> None:
        tokens = [token for emitted in wanted for token in emitted]
        assert log.tokens_BS[b, : len(tokens) + 1].tolist() == [*tokens, -1][: log.tokens_BS.shape[1]], "a wrong token"
        assert log.count_ZB[: len(wanted), b].tolist() == list(map(len, wanted)), "other drafts were accepted"
        sequence.ids += tokens
