"""Texts as rows in which every token is scored exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32


class ScoredRows(NamedTuple):
    """A batch of rows of T + 1 tokens: predictions are made from the first T of them.

    Attributes:
        ids_BT: tokens, int32.
        start_BT: the index within the row where each token's document begins; attention may not look before it.
        scored_BT: whether a token is to be scored as a target; never in column 0, so `scored_BT[:, 1:]` goes with
            predictions from `ids_BT[:, :-1]`.
        document_B: the document of each row; −1 for a row that fills up the batch.
    """

    ids_BT: Int32[np.ndarray, "B T"]
    start_BT: Int32[np.ndarray, "B T"]
    scored_BT: Bool[np.ndarray, "B T"]
    document_B: Int32[np.ndarray, "B"]


_Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.int32]


def scored_rows(
    documents: Sequence[np.ndarray], end_id: int, *, batch_size: int, seq_len: int, context: int
) -> Iterator[ScoredRows]:
    """Batches in which every token of every document is scored exactly once.

    A document is read behind an end token, from which its first token is predicted. Where it is longer than a row, the
    next row repeats the last `context` tokens before it goes on, so each token but the first ones of the document is
    predicted from at least that many.

    Args:
        documents: tokens of each.
        end_id: the token that stands between documents.
        batch_size: rows in a batch; the last batch is filled up with rows in which nothing is scored.
        seq_len: predictions in a row.
        context: tokens before the first scored one in a continued row, from 1 (fastest) to `seq_len`; half of `seq_len`
            takes twice the time and tells more of what a model can do.

    Raises:
        ValueError: `context` is outside its range.
    """
    if not 1 <= context <= seq_len:
        raise ValueError(f"context is {context}; it must be from 1 to seq_len = {seq_len}")
    filler = _row(np.zeros(0, np.int32), end_id, -1, 0, 0, seq_len + 1)
    batch: list[_Row] = []
    for number, document in enumerate(documents):
        scored = 1  # of the document with the end token before it
        while scored < len(document) + 1:
            begin = 0 if scored == 1 else scored - context
            batch.append(_row(document, end_id, number, begin, scored, seq_len + 1))
            scored = begin + seq_len + 1
            if len(batch) == batch_size:
                yield _stack(batch)
                batch = []
    if batch:
        yield _stack(batch + [filler] * (batch_size - len(batch)))


def _row(document: np.ndarray, end_id: int, number: int, begin: int, scored: int, width: int) -> _Row:
    """Tokens `begin` to `begin + width` of a document with an end token before it, scored from `scored` on."""
    ids = np.full(width, end_id, np.int32)
    starts = np.arange(width, dtype=np.int32)  # what fills up the row sees itself only
    flags = np.zeros(width, bool)
    if number >= 0:
        piece = document[max(begin - 1, 0) :][: width - (begin == 0)]
        at = int(begin == 0)  # the first row has the end token in column 0
        ids[at : at + len(piece)] = piece
        starts[at : at + len(piece)] = at
        flags[scored - begin : at + len(piece)] = True
    return ids, starts, flags, np.int32(number)


def _stack(rows: list[_Row]) -> ScoredRows:
    return ScoredRows(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
