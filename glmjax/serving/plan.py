"""What one dispatch does: made by the scheduler, run on the device, and read again with its log. Never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Several

import numpy as np

from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.serving.offload import Move
from glmjax.serving.pages import PageTable
from glmjax.serving.programs import Batch, Chunks, Guesses
from glmjax.serving.sequence import Sequence
from glmjax.serving.shapes import Shape


@dataclasses.dataclass(frozen=True)
class Admission:
    """A slot that is given to a request before a program runs.

    Attributes:
        slot: which.
        generation: its new one.
        params: how the request is sampled.
        prompt: its tokens.
        emitted: tokens it has emitted before, which penalties count.
        ends: tokens that end it.
    """

    slot: int
    generation: int
    params: SamplingParams
    prompt: tuple[int, ...]
    emitted: tuple[int, ...]
    ends: tuple[int, ...] = ()

    def sampling(self, vocab: int, tokens: int | None) -> SamplingState:
        """What the slot begins with, on the host.

        Args:
            vocab: V.
            tokens: how many of them the tokenizer has, or None for all.
        """
        state = SamplingState.on_host([self.params], [self.prompt], vocab, tokens, [self.ends])
        np.add.at(state.counts_BV[0], np.array(self.emitted, np.int64), 1)
        return state


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One dispatch. Its arrays are its own and read-only: the device may look at them while later plans are made.

    Attributes:
        shape: the program's, or None where there are pages to retire and nothing else to do.
        sequences: who takes part, in order of rows.
        admitted: slots to give away first.
        batch: the sequences' arrays.
        chunks: what is read, or None.
        guesses: what is verified, or None.
        end_B: how far each may get, or None.
        rounds: of decoding.
        promised: tokens that each sequence emits at least.
        moves: pages to collect or to land first.
    """

    shape: Shape | None
    sequences: tuple[Sequence, ...]
    admitted: tuple[Admission, ...] = ()
    batch: Batch | None = None
    chunks: Chunks | None = None
    guesses: Guesses | None = None
    end_B: np.ndarray | None = None
    rounds: np.ndarray | None = None
    promised: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()


def batch_of(
    shape: Shape, sequences: Several[Sequence], retire: Several[int], most_retired: int, stop_ids: int
) -> Batch:
    """The arrays of sequences, padded to a program's shape.

    Args:
        shape: B and M.
        sequences: up to B.
        retire: pages.
        most_retired: Z, places for them.
        stop_ids: U, places for stop tokens. Of a request with more, the host looks for the others.
    """
    table = np.full((2, shape.batch, shape.pages), -1, np.int32)
    slots = np.full((2, shape.batch), -1, np.int32)
    stop_BU = np.full((shape.batch, stop_ids), -1, np.int32)
    retire_Z = np.full(most_retired, -1, np.int32)
    retire_Z[: len(retire)] = retire
    for b, sequence in enumerate(sequences):
        slots[:, b] = sequence.slot, sequence.generation
        table[:, b, : len(sequence.leases)] = np.array(sequence.leases, np.int32).reshape(-1, 2).T
        stops = sorted(sequence.request.stops.token_ids)[:stop_ids]
        stop_BU[b, : len(stops)] = stops
    scored = any(sequence.request.params.logprobs is not None for sequence in sequences)
    arrays = frozen(*slots, *table, stop_BU, retire_Z)
    hook_B = np.zeros(shape.batch, np.int32)
    hook_B[: len(sequences)] = [sequence.request.hook for sequence in sequences]
    table = PageTable(arrays[2], arrays[3])
    return Batch(arrays[0], arrays[1], table, arrays[4], arrays[5], np.array(scored), *frozen(hook_B))


def chunks_of(shape: Shape, sequences: Several[Sequence]) -> Chunks:
    """The next chunk of each sequence."""
    ids_BT = np.zeros((shape.batch, shape.width), np.int32)
    begin_B, count_B = np.zeros((2, shape.batch), np.int32)
    final_B, first_B = np.zeros(shape.batch, bool), np.full(shape.batch, -1, np.int32)
    target_BT = np.full((shape.batch, shape.width), -1, np.int32)
    for b, sequence in enumerate(sequences):
        first_B[b] = sequence.expected[0] if sequence.expected else -1
        piece = sequence.ids[sequence.sent : sequence.sent + shape.width]
        ids_BT[b, : len(piece)] = piece
        begin_B[b], count_B[b] = sequence.sent, len(piece)
        final_B[b] = sequence.sent + len(piece) == len(sequence.ids)
        if sequence.request.scoring:
            following = sequence.request.prompt[sequence.sent + 1 : sequence.sent + 1 + len(piece)]
            target_BT[b, : len(following)] = following
    drawing = [sequence if final else None for sequence, final in zip(sequences, final_B, strict=False)]
    allowed_B1W = masks_of(shape, 1, drawing)
    allowed_BW = None if allowed_B1W is None else allowed_B1W[:, 0]
    return Chunks(*frozen(ids_BT, begin_B, count_B, final_B, first_B, target_BT), allowed_BW)


def guesses_of(shape: Shape, sequences: Several[Sequence]) -> Guesses:
    """The next tokens of each sequence, which are to be confirmed or which its grammar forces."""
    guess_BT = np.full((shape.batch, shape.width - 1), -1, np.int32)
    forced_B = np.zeros(shape.batch, bool)
    for b, sequence in enumerate(sequences):
        piece = sequence.guesses(shape.width - 1)
        guess_BT[b, : len(piece)], forced_B[b] = piece, sequence.confirming
    return Guesses(*frozen(guess_BT, forced_B), masks_of(shape, shape.width, sequences))


def masks_of(shape: Shape, width: int, sequences: Several[Sequence | None]) -> np.ndarray | None:
    """What grammars allow after each sequence's newest token and its guesses, int32 [B, T, W]; everything without one.

    None where the program masks nothing.
    """
    if not shape.words:
        return None
    allowed_BTW = np.full((shape.batch, width, shape.words), -1, np.int32)
    for b, sequence in enumerate(sequences):
        if sequence is not None and (matcher := sequence.matcher) is not None:
            mask_TW = matcher.allowed(sequence.guesses(width - 1))
            allowed_BTW[b, : len(mask_TW)] = mask_TW
    return frozen(allowed_BTW)[0]


def frozen(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Read-only from now on."""
    for array in arrays:
        array.setflags(write=False)
    return arrays
