"""Who runs next: prompts in chunks beside decoding, neither of which starves the other. Plain Python on NumPy plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from glmjax.serving.config import EngineConfig
from glmjax.serving.drafting import Depths
from glmjax.serving.plan import Plan, batch_of, chunks_of, frozen, guesses_of
from glmjax.serving.programs import Log
from glmjax.serving.running import MOST_RETIRED, Running
from glmjax.serving.shapes import Shape, Shapes

STOP_IDS = 16
"""Stop tokens of a sequence that the device knows; the host looks for others."""


class Scheduler:
    """Makes plans.

    Args:
        config: the engine's.
        shapes: of its programs.
        running: who waits and runs.
    """

    def __init__(self, config: EngineConfig, shapes: Shapes, running: Running):
        self._config, self._shapes, self._running = config, shapes, running
        self._turns: list[Callable[[], Plan | None]] = [self._read, self._confirm, self._obey, self._decode]
        self._round_seconds: dict[Shape, float] = {}
        self._depths = Depths(shapes.depths)
        self._credit = 0.0  # seconds; below 0, those under grammars owe others time

    def plan(self, now: float) -> Plan | None:
        """The next dispatch, or None where there is nothing to do before a log has been read.

        Args:
            now: `time.monotonic()`.
        """
        running = self._running
        running.settle()
        running.expire(now)
        running.land(now)
        running.retire()
        admitted = tuple(running.admit(now))
        plan = self._next()
        if plan is None and running.settle():  # whoever has just been preempted gives way at once
            plan = self._next()
        retired, moves = running.take_retired(), running.moves()
        if plan is None:
            if not (retired or admitted or moves):
                return None
            plan = Plan(None, ())
        for sequence, promised in zip(plan.sequences, plan.promised, strict=True):
            sequence.unread += 1
            sequence.promised += promised
        shape = plan.shape or Shape("decode", 0, 0, 0)
        batch = batch_of(shape, plan.sequences, retired, MOST_RETIRED, STOP_IDS)
        return dataclasses.replace(plan, admitted=admitted, batch=batch, moves=moves)

    def learn(self, plan: Plan, log: Log, seconds: float) -> None:
        """How long a round takes, and what those under grammars have had."""
        if plan.shape is not None and plan.shape.kind == "decode" and log.rounds:
            before = self._round_seconds.get(plan.shape, seconds / log.rounds)
            self._round_seconds[plan.shape] = 0.7 * before + 0.3 * seconds / log.rounds
            constrained = sum(s.request.reply.matcher is not None for s in self._running.sequences)
            share = min(0.5, self._config.grammar_share * constrained)
            self._credit = min(0.0, self._credit + seconds * share / (1 - share))
        elif plan.guesses is not None and not plan.guesses.forced_B.any():
            self._credit -= seconds

    def _next(self) -> Plan | None:
        """Reading, confirming, rounds under grammars and decoding take turns."""
        for n, turn in enumerate(self._turns):
            if (plan := turn()) is not None:
                self._turns = self._turns[n + 1 :] + self._turns[: n + 1]
                return plan
        return self._obey(owing=True)

    def _read(self) -> Plan | None:
        """Chunks of prompts; who has had one goes to the end of the line. Who has little left ends with others like him."""
        reading = [s for s in self._running.sequences if s.reads and not self._running.waits(s)]
        line = sorted(reading, key=lambda s: (s.request.priority, s.turn))
        if not line:
            return None
        ending = [s for s in line if len(s.ids) - s.sent <= self._shapes.ending]
        if line[0] in ending:
            line, shape = ending, self._shapes.end(len(ending), max(len(s.leases) for s in ending))
        else:
            shape = self._shapes.read([len(s.ids) - s.sent for s in line], [len(s.leases) for s in line])
        chosen = tuple(line[: shape.batch])
        chunks = chunks_of(shape, chosen)
        for sequence, count, final in zip(chosen, chunks.count_B, chunks.final_B, strict=False):
            sequence.sent += int(count)
            sequence.begun = bool(final)
            sequence.turn += 1
        return Plan(shape, chosen, chunks=chunks, promised=tuple(map(int, chunks.final_B[: len(chosen)])))

    def _confirm(self) -> Plan | None:
        """A stretch of what a suspicious sequence has emitted."""
        for sequence in self._running.sequences:
            if sequence.confirms and self._running.grow(sequence, self._shapes.confirmed):
                shape = self._shapes.confirm(len(sequence.leases))
                guesses, left = guesses_of(shape, [sequence]), len(sequence.expected) - sequence.confirmed
                # Before the record ends nothing is drawn: it would be compared with nothing.
                end = sequence.end if left < shape.width else sequence.position + shape.width - 1
                return Plan(shape, (sequence,), guesses=guesses, end_B=frozen(np.int32([end]))[0], promised=(1,))
        return None

    def _obey(self, owing: bool = False) -> Plan | None:
        """A round of all whose grammars know what has come: along what these force, and a token more.

        Args:
            owing: whether they may take time from others that they do not have: nobody else can be served.
        """
        if self._credit < 0 and not owing and any(s.decodes for s in self._running.sequences):
            return None
        obeying = sorted(
            (s for s in self._running.sequences if s.obeys), key=lambda s: (s.request.priority, s.request.number)
        )
        most = self._shapes.obeyed
        chosen = tuple(s for s in obeying if self._running.grow(s, 1 + len(s.guesses(most - 1))))
        if not chosen:
            return None
        tokens = max(1 + len(s.guesses(most - 1)) for s in chosen)
        shape = self._shapes.obey(len(chosen), tokens, max(len(s.leases) for s in chosen))
        end_B = np.zeros(shape.batch, np.int32)
        end_B[: len(chosen)] = [s.end for s in chosen]
        guesses = guesses_of(shape, chosen)
        return Plan(shape, chosen, guesses=guesses, end_B=frozen(end_B)[0], promised=(1,) * len(chosen))

    def _decode(self) -> Plan | None:
        """Rounds of all that decode and have the pages for it."""
        decoding = [s for s in self._running.sequences if s.decodes]
        decoding.sort(key=lambda s: (s.request.priority, s.request.number))
        if not decoding:
            return None
        acceptances = [s.request.acceptance for s in decoding]
        depth = self._depths.choose(acceptances, lambda depth: self._seconds(len(decoding), depth))
        rounds, per_round = self._rounds(len(decoding), depth), 1 + (depth + 1) // 2
        chosen = tuple(s for s in decoding if self._running.grow(s, rounds * per_round))
        if not chosen:
            return None
        shape = self._shapes.decode(len(chosen), max(len(s.leases) for s in chosen), depth)
        room = [min(s.end, len(s.leases) * self._config.page_size) - s.position - s.promised for s in chosen]
        rounds = min(rounds, max(room))
        end_B = np.zeros(shape.batch, np.int32)
        end_B[: len(chosen)] = [s.end for s in chosen]
        return Plan(
            shape,
            chosen,
            end_B=frozen(end_B)[0],
            rounds=np.array(rounds, np.int32),
            promised=tuple(max(0, min(rounds, n)) for n in room),
        )

    def _rounds(self, sequences: int, depth: int) -> int:
        """As many as take `dispatch_seconds`, or a quarter of it while somebody waits for the device."""
        one = self._seconds(sequences, depth)
        seconds = self._config.dispatch_seconds / (4 if self._running.pressed else 1)
        return int(np.clip(seconds / one, 1, self._config.max_rounds)) if one else 4

    def _seconds(self, sequences: int, depth: int) -> float | None:
        """Of a round; None where it is not known."""
        fits = (shape for shape in self._round_seconds if shape.batch >= sequences and shape.width == depth + 1)
        return min((self._round_seconds[shape] for shape in fits), default=None)
