"""``python -m glmjax.serving.replay``: dispatch again what an engine has recorded, and see whether the same comes of it.

The engine's own programs run in the same order on the same pages at the same versions, so a fault of the schedule comes
again; where they are kept (`glmjax.compilation_cache`), nothing is compiled. What was in the cache and in the host's
memory before the recording began is read from its tokens: that comes out the same but for rounding.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from glmjax.glm import GLM
from glmjax.glm import load as load_model
from glmjax.kept_programs import compilation_cache
from glmjax.model.checkpoint import Fp8
from glmjax.model.sampling_params import SamplingParams
from glmjax.nano import NANO
from glmjax.serving.compiled import Programs
from glmjax.serving.hooks import Hooks
from glmjax.serving.masks import unpacked
from glmjax.serving.offload import Move
from glmjax.serving.pages import OK, PagedCache, PageRecords
from glmjax.serving.plan import Plan, batch_of, frozen, masks_of
from glmjax.serving.pool import Lease
from glmjax.serving.programs import Chunks, Log
from glmjax.serving.recorder import Filled, Recording, Snapshot, load
from glmjax.serving.records import split
from glmjax.serving.request import Request
from glmjax.serving.sequence import Sequence
from glmjax.serving.shapes import Shape
from glmjax.serving.slots import Slots
from glmjax.serving.tree import Prefix

_NOBODY = Request(prompt=[0], params=SamplingParams(), new_tokens=1)


class Again(NamedTuple):
    """A sequence's part in a dispatch, as it was and as it came again.

    Attributes:
        number: of the dispatch, in the recording.
        epoch: of the cache after it; None where its log was never read.
        request: whose.
        kind: "read", "decode" or "verify".
        pages: the sequence's, with their versions.
        recorded: the tokens it gave then; None where its log was never read.
        tokens: those it gives now.
        fault: the verdict on its pages now.
    """

    number: int
    epoch: int | None
    request: int
    kind: str
    pages: tuple[Lease, ...]
    recorded: tuple[int, ...] | None
    tokens: tuple[int, ...]
    fault: int

    @property
    def same(self) -> bool:
        """Whether the same came of it."""
        return self.recorded in (None, self.tokens)


_HOOKED = (
    "this was recorded with hooks, which are code and not in the file; replay it in Python with "
    "glmjax.serving.replay.Replay(glm, header, hooks)"
)


class Replay:
    """A device on which recordings are flown again.

    Args:
        glm: the model that was served.
        header: of the recordings.
        hooks: those of the engine, which a file cannot hold.

    Raises:
        ValueError: the engine had hooks, and there are none.
    """

    def __init__(self, glm: GLM, header: dict[str, Any], hooks: Hooks | None = None):
        if header["hooks"] and hooks is None:
            raise ValueError(_HOOKED)
        self._glm, self._header = glm, header
        self._reading = Shape("read", 1, header["chunk_tokens"], header["max_pages"], header["words"])
        self._programs = Programs(
            glm.weights,
            most_rounds=header["max_rounds"],
            most_retired=header["most_retired"],
            stop_ids=header["stop_ids"],
            hooks=hooks,
        )

    def run(self, recording: Recording) -> Iterator[Again]:
        """Everything that was dispatched, part by part."""
        self._restore(recording.snapshot, [flight.plan for flight in recording.flights])
        for number, flight in enumerate(recording.flights):
            plan = unpacked(flight.plan)
            log = self._fly(plan)
            for b, request in enumerate(flight.requests):
                leases = np.stack([plan.batch.table.pages_BM[b], plan.batch.table.versions_BM[b]], 1)
                yield Again(
                    number=number,
                    epoch=None if flight.log is None else int(flight.log.epoch),
                    request=request,
                    kind=plan.shape.kind,
                    pages=tuple(Lease(*lease) for lease in leases.tolist() if lease[0] >= 0),
                    recorded=None if flight.log is None else _tokens(flight.log, b),
                    tokens=_tokens(log, b),
                    fault=int(log.fault_B[b]),
                )

    def _begin(self, pages: int) -> None:
        """An empty cache, all of it at version 0, and slots that nobody has."""
        glm, header = self._glm, self._header
        self._cache = self._slots = None  # first lets go of those before
        self._cache = PagedCache.create(
            glm.config,
            pages,
            header["page_size"],
            jnp.dtype(header["kv_cache_dtype"]),
            tail_dtype=glm.weights.dtype,
            mtp=glm.weights.mtp is not None,
            versioned=header["versioned"],
        )
        width, vocab = glm.config.hidden_size, glm.config.vocab_size
        self._slots = Slots.create(header["max_num_seqs"], width, vocab, glm.weights.dtype)

    def _fly(self, plan: Plan) -> Log | None:
        tokens = self._glm.tokenizer.vocab_size if self._glm.tokenizer else None
        for admission in plan.admitted:
            sampling = admission.sampling(self._glm.config.vocab_size, tokens)
            self._slots = self._programs.admit(self._slots, admission.slot, admission.generation, sampling)
        for move in plan.moves:
            if move.ids:
                self._land(move)
            else:
                self._collect(move)
        self._cache, self._slots, log = self._programs.dispatch(plan, self._cache, self._slots)
        return log

    # What was there before

    def _restore(self, snapshot: Snapshot, plans: Several[Plan]) -> None:
        """Read what the host's memory and the pages held, all at version 0, and give the pages their versions."""
        self._begin(len(snapshot.versions))
        shapes = [self._reading, *(plan.shape for plan in plans if plan.shape is not None)]
        self._programs.compile(shapes, self._cache, self._slots, offloads=any(plan.moves for plan in plans))
        self._collected: dict[Prefix, PageRecords] = {}
        for move in _landed_first(plans):
            self._collect_again(move)
            self._begin(len(snapshot.versions))
        filled: set[Lease] = set()
        for of in snapshot.cached:  # while the slots are nobody's: whoever is admitted has generation 1 or a later one
            self._fill(of, filled)
        for slot in snapshot.slots:
            self._fly(Plan(None, (), admitted=(slot.admission,), batch=self._batch(None)))
        for slot in snapshot.slots:
            self._fill(slot.filled, filled, slot.admission.slot, slot.admission.generation, slot.newest)
        self._cache = dataclasses.replace(self._cache, version_G=jnp.asarray(snapshot.versions, jnp.int32))

    def _fill(
        self, of: Filled, filled: set[Lease], slot: int = 0, generation: int = 0, newest: int | None = None
    ) -> None:
        """Read tokens into pages, but for those that have been filled before; then give the slot its newest token."""
        size = self._header["page_size"]
        leases = [Lease(lease.page, 0) for lease in of.leases]
        begin = 0
        while begin < len(leases) and leases[begin] in filled and (begin + 1) * size <= len(of.ids):
            begin += 1
        filled.update(leases[: len(of.ids) // size])
        self._read(of.ids, leases, slot, generation, begin * size, newest, hook=of.hook)

    def _read(
        self,
        ids: tuple[int, ...],
        leases: list[Lease],
        slot: int = 0,
        generation: int = 0,
        begin: int = 0,
        newest: int | None = None,
        hook: int = 0,
    ) -> None:
        shape, width = self._reading, self._reading.width
        masks_B1W = masks_of(shape, 1, [None])
        while begin < len(ids) or newest is not None:
            piece = ids[begin : begin + width]
            final = newest is not None and begin + len(piece) == len(ids)
            ids_BT = np.zeros((1, width), np.int32)
            ids_BT[0, : len(piece)] = piece
            chunks = Chunks(
                *frozen(
                    ids_BT,
                    np.int32([begin]),
                    np.int32([len(piece)]),
                    np.array([final]),
                    np.int32([newest if final else -1]),
                    np.full_like(ids_BT, -1),
                ),
                allowed_BW=None if masks_B1W is None else masks_B1W[:, 0],
            )
            batch = dataclasses.replace(self._batch(shape, leases, slot, generation), hook_B=np.int32([hook]))
            log = self._fly(Plan(shape, (), batch=batch, chunks=chunks))
            assert int(log.fault_B[0]) == OK, "what the recording began with does not fit into its pages"
            begin += len(piece)
            newest = None if final else newest

    def _batch(
        self, shape: Shape | None, leases: list[Lease] | None = None, slot: int = -1, generation: int = 0
    ) -> Any:
        sequence = Sequence(_NOBODY, slot, generation, leases or [], [], 0, 0)
        shape = shape or Shape("read", 0, 0, 0)
        return batch_of(shape, [sequence] * shape.batch, (), self._header["most_retired"], self._header["stop_ids"])

    # To the host's memory and back

    def _collect(self, move: Move) -> None:
        for piece, records, ok_Z in self._programs.collect(self._cache, move):
            pages = zip(piece.prefixes, split(records), np.asarray(ok_Z), strict=False)
            self._collected |= {prefix: page for prefix, page, ok in pages if ok}

    def _land(self, move: Move) -> None:
        pages = tuple(self._collected[prefix] for prefix in move.prefixes)
        self._cache, _ = self._programs.land(self._cache, dataclasses.replace(move, pages=pages))

    def _collect_again(self, move: Move) -> None:
        """What a move lands, into the first pages and out of them: nothing else is there yet."""
        pages = [Lease(n, 0) for n in range(len(move.ids) // self._header["page_size"])]
        self._read(move.ids, pages, hook=move.hook)
        self._collect(Move(tuple(pages[len(pages) - len(move.prefixes) :]), move.prefixes))


def _landed_first(plans: Several[Plan]) -> Iterator[Move]:
    """Moves that land a page which none before them has landed.

    Some of these pages have been collected by then: what comes of that takes the place of what was read before. Nothing
    may come of it in a replay, where the page was let go of as the recording began, or where other tokens came.
    """
    landed: set[Prefix] = set()
    for plan in plans:
        for move in plan.moves:
            if move.ids and not landed.issuperset(move.prefixes):
                yield move
                landed.update(move.prefixes)


def _tokens(log: Log, b: int) -> tuple[int, ...]:
    return tuple(token for token in np.asarray(log.tokens_BS)[b].tolist() if token >= 0)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Dispatch again what `Engine.record` has saved, and tell what comes out differently.

    Attributes:
        file: the recording.
        model_path: directory of the checkpoint that was served; default the model in the box.
        fp8: as it was served: the matrices of an FP8 checkpoint kept as FP8, or dequantised while loading.
        request: also tell every dispatch of this request.
        before: replay the recording before the last one.
        compilation_cache: folder that keeps compiled programs, best that of the engine; default
            JAX_COMPILATION_CACHE_DIR or the user's cache.
    """

    file: tyro.conf.Positional[Path]
    model_path: Path = NANO
    fp8: Fp8 = "keep"
    request: int | None = None
    before: bool = False
    compilation_cache: Path | None = None


def main(argv: Several[str] | None = None) -> int:
    """Replay and tell: 0, 1 where something came out differently, 2 after a message where there is nothing to replay.

    Args:
        argv: the command line; default the process's own.

    Raises:
        SystemExit: after --help (0) or arguments that cannot be read (2).
    """
    arguments = tyro.cli(Arguments, prog="python -m glmjax.serving.replay", args=argv)
    try:
        header, recording = _asked(arguments)
        compilation_cache(arguments.compilation_cache)
        dtypes = {name: header[name] for name in ("dtype", "kv_cache_dtype")}
        glm = load_model(arguments.model_path, fp8=arguments.fp8, **dtypes)
    except (ValueError, OSError) as error:
        print(f"glmjax.serving.replay: {error}", file=sys.stderr)
        return 2
    parts = different = 0
    for again in Replay(glm, header).run(recording):
        parts += 1
        different += not again.same
        if again.request == arguments.request or not again.same:
            pages = " ".join(f"{page}@{version}" for page, version in again.pages)
            print(f"dispatch {again.number}, epoch {again.epoch}: request {again.request} {again.kind}, pages {pages}")
            print(f"    fault {again.fault}, tokens {list(again.tokens)}")
            if not again.same:
                print(f"    recorded   {list(again.recorded)}")
    print(f"{parts} parts of dispatches replayed, {different} came out differently")
    return int(different > 0)


def _asked(arguments: Arguments) -> tuple[dict[str, Any], Recording]:
    """Refuses what it can before the model is loaded, which may take long."""
    header, recordings = load(arguments.file)
    if arguments.before and len(recordings) < 2:
        raise ValueError(f"{arguments.file} has one recording only; leave out --before")
    if header["hooks"]:
        raise ValueError(_HOOKED)
    recording = recordings[-2 if arguments.before else -1]
    told = sorted({request for flight in recording.flights for request in flight.requests})
    if arguments.request is not None and arguments.request not in told:
        there = f"has requests {told[0]}..{told[-1]}" if told else "has no request"
        raise ValueError(f"request {arguments.request} is not in the recording, which {there}; see --before")
    return header, recording


if __name__ == "__main__":
    sys.exit(main())
