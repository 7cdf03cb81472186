"""The shapes that programs are compiled for: few, declared beforehand, and every dispatch takes the smallest that fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from glmjax.model.grammar import words_of
from glmjax.serving.config import EngineConfig
from glmjax.serving.drafting import depths


class Shape(NamedTuple):
    """Of one program.

    Attributes:
        kind: "read" prompts, "decode", or "verify" tokens that the host knows.
        batch: B, sequences.
        width: T, tokens of a chunk; when decoding, of a round, drafts and one; when verifying, of a chain.
        pages: M, pages of a sequence.
        words: W, of masks over the vocabulary; 0 where nothing is masked.
    """

    kind: Literal["read", "decode", "verify"]
    batch: int
    width: int
    pages: int
    words: int = 0


_ENDING = 8
"""Tokens that prompts may have left to end together: mostly prompts that are cached."""

_OBEYED = (1, 8)
"""Tokens of a sequence in a round under its grammar: the one that it draws, and those that are forced before it."""


class Shapes:
    """All of an engine's.

    Args:
        config: the engine's.
        max_model_len: tokens of a sequence.
        vocab: V, for masks where there are grammars.

    Attributes:
        ending: most tokens that are left of prompts which end together.
        depths: drafts of a round, most first.
        words: W, of masks over the vocabulary; 0 without grammars.
        confirmed: tokens of a round that confirms, the newest one included.
        obeyed: most tokens of a sequence in a round under its grammar.
    """

    obeyed = _OBEYED[-1]

    def __init__(self, config: EngineConfig, max_model_len: int, vocab: int = 0):
        size = config.page_size
        most = -(-max_model_len // size)
        fewest = min(most, max(1, 512 // size))
        self._pages = [*_doubling(fewest, most)]
        self._batches = [*_doubling(1, config.max_num_seqs, by=4)]
        self._several = self._batches[1:] or self._batches
        self.ending = min(_ENDING, size)
        alone = [(1, width) for width in _doubling(size, config.chunk_tokens, by=2)]
        together = 4
        fits = together <= config.max_num_seqs and together * size <= config.chunk_tokens
        self._chunks = [*alone, (together, size)] if fits else alone
        self.confirmed = max(2, size)
        self.depths = depths(config.num_draft, config.adapts_draft)
        self.words = words_of(vocab) if config.grammars else 0

    def __iter__(self) -> Iterable[Shape]:
        for pages in self._pages:
            yield from (Shape("read", batch, width, pages, self.words) for batch, width in self._chunks)
            yield from (self.end(batch, pages) for batch in self._several)
            yield from (self.decode(batch, pages, depth) for batch in self._batches for depth in self.depths)
            yield self.confirm(pages)
            if self.words:
                yield from (self.obey(batch, width, pages) for batch in self._batches for width in _OBEYED)

    def __str__(self) -> str:
        several = ", ".join(map(str, self._batches))
        chunks = ", ".join(f"{batch} x {width}" if batch > 1 else f"{width}" for batch, width in self._chunks)
        return f"{several} sequences; chunks of {chunks} tokens; {', '.join(map(str, self._pages))} pages of a sequence"

    def end(self, sequences: int, pages: int) -> Shape:
        """For so many prompts of up to so many pages that have `ending` tokens left at most."""
        batch = _least(self._several, sequences)
        return Shape("read", batch, self.ending, _least(self._pages, pages), self.words)

    def decode(self, sequences: int, pages: int, depth: int) -> Shape:
        """For so many sequences of up to so many pages, with so many drafts in a round."""
        return Shape("decode", _least(self._batches, sequences), depth + 1, _least(self._pages, pages))

    def confirm(self, pages: int) -> Shape:
        """For a stretch of one sequence's tokens, with so many pages."""
        return Shape("verify", 1, self.confirmed, _least(self._pages, pages), self.words)

    def obey(self, sequences: int, tokens: int, pages: int) -> Shape:
        """For a round of so many sequences that follow grammars, with up to so many tokens of each."""
        width = _least(_OBEYED, min(tokens, self.obeyed))
        return Shape("verify", _least(self._batches, sequences), width, _least(self._pages, pages), self.words)

    def read(self, left: Sequence[int], pages: Sequence[int]) -> Shape:
        """For the prompts at the head of a line: the shape that reads most of them and pads least.

        Args:
            left: tokens that each of them still has to be read of, in order; at least one.
            pages: of each.
        """

        def worth(chunk: tuple[int, int]) -> float:
            batch, width = chunk
            useful = sum(min(tokens, width) for tokens in left[:batch])
            return useful - 0.5 * (batch * width - useful)

        batch, width = max(self._chunks, key=worth)
        return Shape("read", batch, width, _least(self._pages, max(pages[:batch])), self.words)


def _doubling(first: int, last: int, by: int = 2) -> Iterable[int]:
    """first, first · by, …, and last."""
    while first < last:
        yield first
        first *= by
    yield last


def _least(sizes: Sequence[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)
