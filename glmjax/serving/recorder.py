"""The flight recorder: what was dispatched lately, so that it can be dispatched again (`glmjax.serving.replay`).

It keeps plans and logs without what is large in them (pages that land, logprobs; masks once each), and begins anew every so many
dispatches, with a snapshot: whose tokens are in which pages. The last recording and the one before it are there to be saved.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import numpy as np

from glmjax.model.sampling_params import SamplingParams
from glmjax.serving import masks
from glmjax.serving.hooks import treatment_of
from glmjax.serving.masks import Masks
from glmjax.serving.offload import Move
from glmjax.serving.pages import PageTable
from glmjax.serving.plan import Admission, Plan
from glmjax.serving.pool import Lease
from glmjax.serving.programs import Batch, Chunks, Guesses, Log
from glmjax.serving.running import Running
from glmjax.serving.sequence import Sequence
from glmjax.serving.shapes import Shape
from glmjax.serving.tree import Prefix

_FORMAT = 2
"""Of the file; another one whenever a replay needs to know more, or something else."""


@dataclasses.dataclass(frozen=True)
class Filled:
    """Pages with the rows of a sequence's first tokens.

    Attributes:
        ids: the tokens.
        leases: the pages, in order.
        hook: the treatment (`glmjax.serving.hooks`) that they were read under; 0 for none.
    """

    ids: tuple[int, ...]
    leases: tuple[Lease, ...]
    hook: int = 0


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A slot in use.

    Attributes:
        admission: to whom it was given; of the tokens emitted before, all but the newest.
        filled: the sequence's rows.
        newest: its newest token; None where it is still being read.
    """

    admission: Admission
    filled: Filled
    newest: int | None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What the device held before a recording's first dispatch.

    Attributes:
        versions: of all pages.
        cached: what the prefix tree held.
        slots: who ran.
    """

    versions: tuple[int, ...]
    cached: tuple[Filled, ...] = ()
    slots: tuple[Resumed, ...] = ()


@dataclasses.dataclass(eq=False)
class Flight:
    """A dispatch.

    Attributes:
        plan: without its sequences.
        requests: the numbers of those it was for, in order of rows.
        log: what it did; None where it has not been read.
    """

    plan: Plan
    requests: tuple[int, ...]
    log: Log | None = None


@dataclasses.dataclass(frozen=True)
class Recording:
    """Dispatches, from a snapshot on.

    Attributes:
        snapshot: of before the first.
        flights: in order.
    """

    snapshot: Snapshot
    flights: list[Flight]


class Recorder:
    """Of one engine. Only the engine's thread calls it, `save` aside.

    Args:
        pages: G.
        length: dispatches of a recording; 0 keeps none.
    """

    def __init__(self, pages: int, length: int):
        self._pages, self._length = pages, length
        self.begin()

    def begin(self) -> None:
        """With an empty cache."""
        self._recordings = (Recording(Snapshot((0,) * self._pages), []),)
        self._masks: dict[str, bytes] = {}

    def dispatched(self, plan: Plan) -> Flight:
        """Keep a plan."""
        moves = tuple(dataclasses.replace(move, pages=()) for move in plan.moves)
        kept = dataclasses.replace(plan, sequences=(), moves=moves)
        if self._length:
            kept = masks.packed(kept, self._masks)
        flight = Flight(kept, tuple(sequence.request.number for sequence in plan.sequences))
        if self._length:
            self._recordings[-1].flights.append(flight)
        return flight

    def read(self, flight: Flight, log: Log) -> None:
        """Keep what a dispatch did."""
        flight.log = dataclasses.replace(log, gap_BS=None, scores_BS=None, captured_BS=None, targets_BT=None)

    def turn(self, running: Running) -> None:
        """Begin another recording where this one is long enough: with what is on the device already, and not yet known."""
        flights = self._recordings[-1].flights
        if self._length and len(flights) >= self._length:
            unread = (n for n, flight in enumerate(flights) if flight.requests and flight.log is None)
            left = flights[next(unread, len(flights)) :]
            self._recordings = (self._recordings[-1], Recording(snapshot(running, left), list(left)))
            self._masks = {}

    def save(self, path: Path, header: dict[str, Any]) -> None:
        """Write what is kept into a file.

        Args:
            path: of the file, which is compressed JSON.
            header: what a replay has to know of the engine.
        """
        found = [
            {"snapshot": _plain(of.snapshot), "flights": [_plain(flight) for flight in list(of.flights)]}
            for of in self._recordings
        ]
        plans = (flight.plan for of in self._recordings for flight in list(of.flights))
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "header": header, "recordings": found, "masks": masks.told(plans)}, file)


def load(path: Path) -> tuple[dict[str, Any], list[Recording]]:
    """What `Recorder.save` has written: the header and the recordings, the last one last.

    Raises:
        ValueError: it is something else, or another version of glmjax has written it.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = json.load(file)
        header, written = found["header"], found.get("format", 1)
        if written == _FORMAT:
            rows = masks.read(found["masks"])
            return header, [
                Recording(_snapshot(of["snapshot"]), [_flight(flight, rows) for flight in of["flights"]])
                for of in found["recordings"]
            ]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a recording ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path} has format {written}, this version reads {_FORMAT}; use the one that recorded it")


def snapshot(running: Running, unread: Several[Flight]) -> Snapshot:
    """What the device held before some dispatches whose outcome is not known yet.

    Args:
        running: after the last log that has been read.
        unread: what has been dispatched since that log's own dispatch.
    """
    versions = list(running.pool.versions)
    for flight in unread:
        for page in flight.plan.batch.retire_Z.tolist():
            if page >= 0:
                versions[page] -= 1
    return Snapshot(
        versions=tuple(versions),
        cached=tuple(Filled(ids, leases, treatment_of(salt)) for ids, leases, salt in running.tree.paths()),
        slots=tuple(_resumed(sequence, unread) for sequence in running.sequences),
    )


def _resumed(sequence: Sequence, unread: Several[Flight]) -> Resumed:
    request, ids = sequence.request, tuple(sequence.request.ids)
    rows = max(sequence.rows, sequence.landed)
    begun = sequence.begun and not any(_draws(flight, request.number) for flight in unread)
    before = ids[len(request.prompt) : rows] if begun else () if sequence.expected else tuple(request.reply.ids)
    prompt = tuple(request.prompt)
    admission = Admission(sequence.slot, sequence.generation, request.params, prompt, before, request.ends)
    filled = Filled(ids[:rows], tuple(sequence.leases), request.hook)
    return Resumed(admission, filled, ids[rows] if begun else None)


def _draws(flight: Flight, number: int) -> bool:
    """Whether a dispatch reads a request's prompt to its end."""
    chunks = flight.plan.chunks
    return chunks is not None and number in flight.requests and bool(chunks.final_B[flight.requests.index(number)])


def _plain(value: Any) -> Any:
    """In words that JSON has: dataclasses as dictionaries, arrays and tuples as lists."""
    if isinstance(value, Prefix):  # of which only the equality matters
        return [repr(value.namespace), value.digest.hex(), value.pages]
    if isinstance(value, Move):
        hook = treatment_of(value.prefixes[0].namespace) if value.prefixes else 0
        return {
            "leases": _plain(value.leases),
            "prefixes": _plain(value.prefixes),
            "ids": list(value.ids),
            "hook": hook,
        }
    if isinstance(value, Masks):
        return {"shape": value.shape, "names": value.names}
    if isinstance(value, Log):
        return {name: getattr(value, name).tolist() for name in _TOLD}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


_TOLD = ("tokens_BS", "count_ZB", "position_B", "stopped_B", "fault_B", "rounds", "epoch")


def _array(value: Any) -> np.ndarray:
    array = np.array(value)
    return array if array.dtype == bool else array.astype(np.int32)


def _arrays(kind: Any, of: dict[str, Any] | None, rows: Mapping[str, bytes] | None = None) -> Any:
    """A dataclass of arrays, masks aside."""
    if of is None:
        return None

    def value_of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return Masks(tuple(value["shape"]), tuple(value["names"]), rows)
        return None if value is None else _array(value)

    return kind(**{name: value_of(value) for name, value in of.items()})


def _admission(of: dict[str, Any]) -> Admission:
    params = {name: tuple(value) if isinstance(value, list) else value for name, value in of["params"].items()}
    params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    tokens = (tuple(of[name]) for name in ("prompt", "emitted", "ends"))
    return Admission(of["slot"], of["generation"], SamplingParams(**params), *tokens)


def _move(of: dict[str, Any]) -> Move:
    prefixes = tuple(Prefix(namespace, bytes.fromhex(digest), pages) for namespace, digest, pages in of["prefixes"])
    return Move(tuple(Lease(*lease) for lease in of["leases"]), prefixes, ids=tuple(of["ids"]), hook=of["hook"])


def _filled(of: dict[str, Any]) -> Filled:
    return Filled(tuple(of["ids"]), tuple(Lease(*lease) for lease in of["leases"]), of["hook"])


def _snapshot(of: dict[str, Any]) -> Snapshot:
    slots = (Resumed(_admission(slot["admission"]), _filled(slot["filled"]), slot["newest"]) for slot in of["slots"])
    return Snapshot(tuple(of["versions"]), tuple(map(_filled, of["cached"])), tuple(slots))


def _flight(of: dict[str, Any], rows: Mapping[str, bytes]) -> Flight:
    plan, log = of["plan"], of["log"]
    batch = dict(plan["batch"])
    table = _arrays(PageTable, batch.pop("table"))
    arrays = {name: _array(value) for name, value in batch.items()}
    told = dict.fromkeys(field.name for field in dataclasses.fields(Log)) | {
        name: np.array(value) for name, value in (log or {}).items()
    }
    return Flight(
        plan=Plan(
            shape=None if plan["shape"] is None else Shape(*plan["shape"]),
            sequences=(),
            admitted=tuple(map(_admission, plan["admitted"])),
            batch=Batch(table=table, **arrays),
            chunks=_arrays(Chunks, plan["chunks"], rows),
            guesses=_arrays(Guesses, plan["guesses"], rows),
            end_B=None if plan["end_B"] is None else _array(plan["end_B"]),
            rounds=None if plan["rounds"] is None else _array(plan["rounds"]),
            moves=tuple(map(_move, plan["moves"])),
        ),
        requests=tuple(of["requests"]),
        log=None if log is None else Log(**told),
    )
