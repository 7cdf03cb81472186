"""Programs compiled before the first request: nothing is compiled afterwards, since only what is compiled here can be called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from glmjax.kept_programs import compiled, described
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.serving import pages, slots
from glmjax.serving.hooks import Hooks
from glmjax.serving.offload import Move
from glmjax.serving.pages import PagedCache, PageRecords
from glmjax.serving.plan import Plan, batch_of, chunks_of, guesses_of
from glmjax.serving.programs import Batch, decode_rounds, read_chunks, verify_chain
from glmjax.serving.records import joined
from glmjax.serving.shapes import Shape
from glmjax.serving.slots import Slots

MOVED_PAGES = 16
"""Pages that a dispatch collects or lands at most."""


class Programs:
    """Everything an engine dispatches.

    Args:
        model: the network, a pytree.
        most_rounds: of a dispatch.
        most_retired: pages that a dispatch retires at most.
        stop_ids: stop tokens of a sequence that the device knows.
        hooks: what else is done in layers; None for nothing.
    """

    def __init__(self, model: Any, *, most_rounds: int, most_retired: int, stop_ids: int, hooks: Hooks | None = None):
        self._leaves, self._structure = jax.tree.flatten(model)
        self._most_rounds, self._most_retired, self._stop_ids = most_rounds, most_retired, stop_ids
        self._hooks = hooks
        # What others have written is not told apart by its `repr`, so it is not kept.
        self._foreign = hooks is not None or not type(model).__module__.startswith("glmjax.")
        self._compiled: dict[Shape | str, Any] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(
        self,
        shapes: Iterable[Shape],
        cache: PagedCache,
        state: Slots,
        *,
        offloads: bool = False,
        progress: bool = False,
        threads: int = 2,
    ) -> None:
        """Compile for these shapes, and what every engine needs.

        Args:
            cache: of the engine; it is not used.
            state: likewise.
            shapes: of all dispatches to come.
            offloads: whether pages are collected and landed.
            progress: whether to show a bar.
            threads: how many are compiled at a time.
        """
        always = ("admit", "retire", *(("collect", "land") if offloads else ()))
        names = [name for name in dict.fromkeys((*always, *shapes)) if name not in self._compiled]
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(lambda name: self._program(name, cache, state), names)
            bar = tqdm(done, "compiling programs", len(names), disable=None if progress else True, leave=False)
            self._compiled |= zip(names, bar, strict=True)

    def temporary_bytes(self) -> dict[Shape | str, int]:
        """Of each program, beside its arguments and results."""
        return {name: program.memory_analysis().temp_size_in_bytes for name, program in self._compiled.items()}

    def admit(self, state: Slots, slot: int, generation: int, sampling: SamplingState) -> Slots:
        """Give a slot to a request; see `glmjax.serving.slots.admit`."""
        return self._compiled["admit"](state, np.array(slot, np.int32), np.array(generation, np.int32), sampling)

    def collect(self, cache: PagedCache, move: Move) -> Iterator[tuple[Move, PageRecords, jax.Array]]:
        """Take records of pages, before anything else happens to them: pieces of the move, what they hold, and whether
        it is what was asked for; see `glmjax.serving.pages.collect`.
        """
        for begin in range(0, len(move.leases), MOVED_PAGES):
            piece = Move(move.leases[begin : begin + MOVED_PAGES], move.prefixes[begin : begin + MOVED_PAGES])
            full_Z = np.full(MOVED_PAGES, cache.page_size, np.int32)
            yield piece, *self._compiled["collect"](cache, *_leased(piece), full_Z)

    def land(self, cache: PagedCache, move: Move) -> tuple[PagedCache, list[tuple[int, jax.Array]]]:
        """Write records into pages; of each piece its pages, and which of them were written. See `glmjax.serving.pages.land`."""
        landed = []
        for begin in range(0, len(move.leases), MOVED_PAGES):
            piece = Move(move.leases[begin : begin + MOVED_PAGES], pages=move.pages[begin : begin + MOVED_PAGES])
            records = joined([*piece.pages, *[piece.pages[0]] * (MOVED_PAGES - len(piece.pages))])
            cache, ok_Z = self._compiled["land"](cache, *_leased(piece), records)
            landed.append((len(piece.leases), ok_Z))
        return cache, landed

    def dispatch(self, plan: Plan, cache: PagedCache, state: Slots) -> tuple[PagedCache, Slots, Any]:
        """Run a plan: the cache and the slots of the next epoch, and the log, which is on its way.

        Raises:
            KeyError: the plan's shape was not compiled.
        """
        if plan.shape is None:
            return self._compiled["retire"](cache, plan.batch.retire_Z), state, None
        given = {"read": plan.chunks, "decode": (plan.end_B, plan.rounds), "verify": (plan.end_B, plan.guesses)}[
            plan.shape.kind
        ]
        return self._compiled[plan.shape](self._leaves, cache, state, self._told(plan.batch), given)

    def _told(self, batch: Batch) -> Batch:
        """A plan's batch as programs take it: without treatments where there are no hooks."""
        return dataclasses.replace(batch, hook_B=None) if self._hooks is None else batch

    def _program(self, name: Shape | str, cache: PagedCache, state: Slots) -> jax.stages.Compiled:
        run, how, donated, arguments = self._parts(name, cache, state)
        lower = functools.partial(self._lowered, name, cache, state)
        return lower().compile() if self._foreign else compiled(lower, run.__name__, how, donated, described(arguments))

    def _lowered(self, name: Shape | str, cache: PagedCache, state: Slots) -> jax.stages.Lowered:
        run, how, donated, arguments = self._parts(name, cache, state)
        return jax.jit(functools.partial(run, **how), donate_argnums=donated).lower(*arguments)

    def _parts(self, name: Shape | str, cache: PagedCache, state: Slots) -> tuple[Any, ...]:
        """Of a program: the function, what it knows beforehand, which arguments it takes for good, and what they look like."""
        if name == "admit":
            vocab = state.sampling.bias_BV.shape[1]
            idle = SamplingState.on_host([SamplingParams(temperature=0)], [()], vocab)
            one = np.array(0, np.int32)
            return slots.admit, {}, (0,), (state, one, one, idle)
        if name == "collect":
            return pages.collect, {}, (), (cache, *np.zeros((3, MOVED_PAGES), np.int32))
        if name == "land":
            leased = np.zeros((2, MOVED_PAGES), np.int32)
            records, _ = jax.eval_shape(pages.collect, cache, *leased, leased[0])
            return pages.land, {}, (0,), (cache, *leased, records)
        if name == "retire":
            return pages.retire, {}, (0,), (cache, np.zeros(self._most_retired, np.int32))
        batch = self._told(batch_of(name, (), (), self._most_retired, self._stop_ids))
        how = {"structure": self._structure, "hooks": self._hooks}
        if name.kind == "read":
            run, given = _read, chunks_of(name, ())
        elif name.kind == "verify":
            run, given = _verify, (np.zeros(name.batch, np.int32), guesses_of(name, ()))
        else:
            run, given = _decode, (np.zeros(name.batch, np.int32), np.array(1, np.int32))
            how |= {"num_draft": name.width - 1, "most_rounds": self._most_rounds}
        return run, how, (1, 2), (self._leaves, cache, state, batch, given)


def _leased(move: Move) -> np.ndarray:
    """Pages and versions, padded."""
    leased = np.full((2, MOVED_PAGES), -1, np.int32)
    leased[:, : len(move.leases)] = np.array(move.leases, np.int32).T
    return leased


def _read(leaves: Any, cache: PagedCache, state: Slots, batch: Any, chunks: Any, *, structure: Any, **how: Any) -> Any:
    return read_chunks(jax.tree.unflatten(structure, leaves), cache, state, batch, chunks, **how)


def _verify(leaves: Any, cache: PagedCache, state: Slots, batch: Any, given: Any, *, structure: Any, **how: Any) -> Any:
    return verify_chain(jax.tree.unflatten(structure, leaves), cache, state, batch, *given, **how)


def _decode(leaves: Any, cache: PagedCache, state: Slots, batch: Any, given: Any, *, structure: Any, **how: Any) -> Any:
    return decode_rounds(jax.tree.unflatten(structure, leaves), cache, state, batch, *given, **how)
