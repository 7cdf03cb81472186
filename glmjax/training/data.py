"""From documents to batches: tokens in memory, rows without padding, an iterator that resumes exactly.

An epoch is all documents in a random order, each followed by `<|endoftext|>`, one after the other; the epochs follow
each other without a seam, and the whole is cut into rows of `seq_len + 1` tokens. So nothing is padded, lost or seen
twice, and a document is cut elsewhere in every epoch. The rows that begin in an epoch are then shuffled among
themselves: a long document fills dozens of rows, which would otherwise make up whole batches.

A share of the rows is then rewritten (`tasks.py`). Any row can be computed from its number, so the state of the
iterator is the number of the next batch.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import Tokenizer

from glmjax.training.corpus import Document
from glmjax.training.vocabulary import END_OF_TEXT

_ENDLESS = 2**40  # rows; grain wants a source to have a length

Rewrite = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""From a row's tokens, their documents' starts and a source of randomness to new tokens and which of them to predict."""


def as_it_is(ids: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The rewrite that changes nothing: every token is predicted."""
    return ids, np.ones(len(ids), bool)


@dataclass(frozen=True)
class Tokens:
    """Tokenised documents, in memory.

    Attributes:
      ids: all tokens, document after document, each with the end token behind it.
      offsets: document i is `ids[offsets[i]:offsets[i + 1]]`.
      end_id: the id of `<|endoftext|>`.
    """

    ids: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " documents_and_one"]
    end_id: int

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def __getitem__(self, i: int | np.integer) -> Int32[np.ndarray, " length"]:
        """The tokens of document i, with the end token."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    """Encodes documents once and for all: about 2 MB a second on one core, so six seconds for the corpus.

    Raises:
      ValueError: there is no document, or the tokenizer has no `<|endoftext|>`.
    """
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    if end_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}; use one made by glmjax.training.vocabulary")
    if not documents:
        raise ValueError("there are no documents to tokenise")
    encodings = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
    parts = [np.array([*encoding.ids, end_id], np.int32) for encoding in encodings]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return Tokens(np.concatenate(parts), offsets, end_id)


class _Epoch(NamedTuple):
    documents: np.ndarray  # in the order in which they follow each other
    ends: np.ndarray  # where in the epoch each of them ends
    rows: np.ndarray  # in the order in which they are seen


class PackedRows:
    """The endless sequence of rows, as a random-access source for grain.

    Row j is a dict of `ids_BT` and `start_BT`, int32 of length `seq_len + 1` (the batch axis comes with batching):
    the tokens, and for each the index within the row where its document begins. Attention may not look before that.
    The end token belongs to the document before it. What is left of a document that was cut begins a row, at index 0.

    Shuffling is NumPy's `default_rng([seed, epoch])`: the same for one version of NumPy on every machine.
    """

    def __init__(self, tokens: Tokens, *, seq_len: int, seed: int, rewrite: Rewrite = as_it_is):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; a row needs at least one token and its target")
        self.tokens = tokens
        self.width = seq_len + 1
        self.seed = seed
        self.rewrite = rewrite
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle)

    @property
    def epoch_rows(self) -> float:
        """How many rows an epoch fills, not a whole number in general."""
        return len(self.tokens.ids) / self.width

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        length = len(self.tokens.ids)
        epoch = row * self.width // length
        first = self._first_row(epoch)
        shuffled = first + int(self._epoch(epoch).rows[row - first])
        ids, starts = self._read(epoch, shuffled * self.width - epoch * length)
        ids, scored = self.rewrite(ids, starts, np.random.default_rng([self.seed, epoch, row]))
        return {"ids_BT": ids, "start_BT": starts, "scored_BT": scored}

    def _first_row(self, epoch: int) -> int:
        """The first row that begins in an epoch."""
        return -(-epoch * len(self.tokens.ids) // self.width)

    def _shuffle(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self.seed, epoch])
        documents = rng.permutation(len(self.tokens))
        ends = np.cumsum(np.diff(self.tokens.offsets)[documents])
        return _Epoch(documents, ends, rng.permutation(self._first_row(epoch + 1) - self._first_row(epoch)))

    def _read(self, epoch: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """One row's tokens and document starts, from a position in an epoch, across its end if need be."""
        ids = np.empty(self.width, np.int32)
        starts = np.empty(self.width, np.int32)
        filled = 0
        while filled < self.width:
            documents, ends, _ = self._epoch(epoch)
            i = int(np.searchsorted(ends, position, side="right"))
            if i == len(documents):
                epoch, position = epoch + 1, 0
                continue
            document = self.tokens[documents[i]]
            piece = document[position - int(ends[i]) + len(document) :][: self.width - filled]
            ids[filled : filled + len(piece)] = piece
            starts[filled : filled + len(piece)] = filled
            filled += len(piece)
            position += len(piece)
        return ids, starts


def training_batches(
    tokens: Tokens, *, batch_size: int, seq_len: int, seed: int, rewrite: Rewrite = as_it_is
) -> grain.IterDataset:
    """Endless batches, dict(ids_BT, start_BT, scored_BT), each [batch_size, seq_len + 1]: see `PackedRows`.

    The first two are int32; `scored_BT` is bool and says which tokens are targets.

    Their order is a function of the seed. `iter()` gives a `grain.DatasetIterator`: its `get_state()` is a small
    dict, and `set_state()` on a new one continues with the very same batches. No processes or threads are started.
    """
    rows = grain.MapDataset.source(PackedRows(tokens, seq_len=seq_len, seed=seed, rewrite=rewrite))
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return rows.batch(batch_size, drop_remainder=True).to_iter_dataset(inline)
