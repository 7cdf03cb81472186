"""What some rows are turned into: blanks to fill, as GLM is trained, lines to recall, and tokens that come again.

All rewrite one document's part of a row and keep its length, so that nothing else moves; what they insert pushes as
many tokens off the part's end.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from glmjax.model.infill import BlankTokens
from glmjax.model.tokenizer import Tokenizer

Part = tuple[Int32[np.ndarray, " length"], Bool[np.ndarray, " length"]]
"""Tokens, and which of them are worth predicting."""

Task = Callable[[np.ndarray, np.random.Generator], Part]
"""From a document's part of a row, the same length."""

_SHORTEST = 48  # tokens of a part that is worth rewriting
_PER_LINE = 48  # tokens of a part for each line that may be planted
_SHORTEST_PIECE, _LONGEST_PIECE = 8, 64  # tokens of what comes again at a stretch
_LONGEST_BLANK = 96
_AT_END = 0.2  # share of the blanks that are the rest of the text
_SEVERAL = 0.3  # share of the others that come in twos and threes
_WHOLE_LINES = 0.5  # share of the spans that are whole lines
_PLACES = ("token", "secret", "label", "access", "session", "marker")
_CHARACTERS = np.array(list(string.ascii_lowercase + string.digits))


class Shares(NamedTuple):
    """Shares of the rows; what is left stays as it is. See `Tasks`.

    Attributes:
        infill: with blanks.
        recall: with planted lines.
        repeat: that repeat themselves.
        copies: of random tokens, over and over.
    """

    infill: float = 0.0
    recall: float = 0.0
    repeat: float = 0.0
    copies: float = 0.0


class Tasks:
    """Rewrites a share of the rows.

    Blank infilling (GLM, arXiv 2103.10360): spans are cut out, a mask stands for each, and they follow in random order.
    Masks and `<sop>` are not predicted, since nothing tells where they come.

    Recall: lines `name = "value"` with random values are planted at line ends of the first half, and lines
    `assert name == "value"` follow in the second. Only the values in the latter are predicted; nothing but attention to
    the former, however far away, can tell them.

    Repetition: after the first half comes the first half again, cut into pieces and shuffled.

    Copies: random tokens come over and over, and only what has come before is predicted. Nothing but looking up what
    followed last time helps there, so that it is learned within a few hundred steps; a text as short as this corpus
    hardly teaches it, and recall is built on it.

    Args:
        tokenizer: of the rows.
        shares: of the rows that each task rewrites.

    Raises:
        ValueError: the shares are not within [0, 1] together, or the vocabulary has no tokens for blanks.
    """

    def __init__(self, tokenizer: Tokenizer, shares: Shares):
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"{shares} must be within [0, 1], and so must their sum")
        self._bounds = np.cumsum(shares)
        self._tokenizer, self._blanks = tokenizer, BlankTokens.of(tokenizer)
        texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
        self._ends_line = np.array([text.endswith("\n") for text in texts])

    def __call__(self, ids: Int32[np.ndarray, " width"], starts: np.ndarray, rng: np.random.Generator) -> Part:
        """A row's tokens, rewritten or not, and which of them are targets worth predicting.

        Args:
            ids: the row.
            starts: where each token's document begins.
            rng: decides.
        """
        ids, scored = ids.copy(), np.ones(len(ids), bool)
        tasks: tuple[Task | None, ...] = (self.with_blanks, self.with_recall, self.with_repeats, self.with_copies, None)
        task = tasks[int(np.searchsorted(self._bounds, rng.random(), side="right"))]
        begins, counts = np.unique(starts, return_counts=True)
        longest = int(np.argmax(counts))
        if task is not None and counts[longest] >= _SHORTEST:
            part = slice(int(begins[longest]), int(begins[longest] + counts[longest]))
            ids[part], scored[part] = task(ids[part], rng)
        return ids, scored

    def with_blanks(self, part: np.ndarray, rng: np.random.Generator) -> Part:
        """One to three blanks within the part, or one at its end."""
        mask, gmask, sop, eop = self._blanks
        if rng.random() < _AT_END:
            body = part[:-3]
            cut = int(rng.integers(len(body) // 4, len(body)))
            out = np.concatenate([body[:cut], [gmask, sop], body[cut:], [eop]])
        else:
            count = int(rng.integers(2, 4)) if rng.random() < _SEVERAL else 1
            body = part[: len(part) - 3 * count]
            spans = [self._span(body, region, rng) for region in np.array_split(np.arange(len(body)), count)]
            kept = np.split(body, [edge for span in spans for edge in span])
            outside, inside = kept[::2], kept[1::2]
            pieces = [outside[0]]
            for piece in outside[1:]:
                pieces += [[mask], piece]
            for i in rng.permutation(count):
                pieces += [[sop], inside[i], [eop]]
            out = np.concatenate(pieces)
        return out.astype(np.int32), ~np.isin(out, (mask, gmask, sop))

    def _span(self, body: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """Begin and end of a span of at least one token within a region of the body; whole lines where it can be."""
        first, last = int(region[0]), int(region[-1]) + 1
        begin = int(rng.integers(first, last))
        end = begin + 1 + int(rng.integers(min(_LONGEST_BLANK, last - begin)))
        if rng.random() < _WHOLE_LINES:
            edges = first + 1 + np.flatnonzero(self._ends_line[body[first:last]])
            if len(edges) > 1:
                begin = int(edges[min(np.searchsorted(edges, begin), len(edges) - 2)])
                longer = edges[(edges > begin) & (edges <= begin + _LONGEST_BLANK)]
                end = int(longer[rng.integers(len(longer))]) if len(longer) else begin + 1
        return begin, end

    def with_recall(self, part: np.ndarray, rng: np.random.Generator) -> Part:
        """Planted lines, as many as one for every `_PER_LINE` tokens, asked for in another order."""
        planted = [self._planted(rng) for _ in range(int(rng.integers(len(part) // _PER_LINE)) + 1)]
        body = part[: len(part) - sum(len(piece) for pieces in planted for piece in pieces)]
        half = len(body) // 2
        begins = self._line_ends(body, 0, half, len(planted), rng)
        asks = self._line_ends(body, half, len(body), len(planted), rng)
        lines = [(at, line, np.zeros(len(line), bool)) for at, (line, _, _) in zip(begins, planted, strict=True)]
        for at, i in zip(asks, rng.permutation(len(planted)), strict=True):
            _, question, answer = planted[i]
            scored = np.repeat([False, True], [len(question), len(answer)])
            lines.append((at, np.concatenate([question, answer]), scored))
        out, flags, done = [], [], 0
        for at, line, scored in sorted(lines, key=lambda item: item[0]):
            out += [body[done:at], line]
            flags += [np.ones(at - done, bool), scored]
            done = at
        out, flags = [*out, body[done:]], [*flags, np.ones(len(body) - done, bool)]
        return np.concatenate(out).astype(np.int32), np.concatenate(flags)

    def with_repeats(self, part: np.ndarray, rng: np.random.Generator) -> Part:
        """The first half, and its pieces in another order."""
        half, size = len(part) // 2, int(rng.integers(_SHORTEST_PIECE, _LONGEST_PIECE + 1))
        pieces = [part[begin : min(begin + size, half)] for begin in range(0, half, size)]
        again = [pieces[i] for i in rng.permutation(len(pieces))]
        return np.concatenate([part[:half], *again, part[2 * half :]]), np.ones(len(part), bool)

    def with_copies(self, part: np.ndarray, rng: np.random.Generator) -> Part:
        """Random tokens as often as they fit."""
        piece = rng.integers(self._tokenizer.vocab_size, size=int(rng.integers(_SHORTEST_PIECE, len(part) // 2 + 1)))
        return np.resize(piece, len(part)).astype(np.int32), np.arange(len(part)) >= len(piece)

    def _planted(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A line to plant, the question about it and the answer."""
        return tuple(np.array(self._tokenizer.encode(text), np.int32) for text in planted_line(rng))

    def _line_ends(self, body: np.ndarray, begin: int, end: int, count: int, rng: np.random.Generator) -> list[int]:
        """Positions behind line ends between two positions, ascending; anywhere where there are no lines."""
        found = begin + 1 + np.flatnonzero(self._ends_line[body[begin : end - 1]])
        return sorted(int(i) for i in rng.choice(found if len(found) else np.arange(begin, end), count))


def planted_line(rng: np.random.Generator) -> tuple[str, str, str]:
    """A line `name = "value"`, and `assert name == "` with `value"` to follow. Every call gives another value."""
    name = f"{_PLACES[rng.integers(len(_PLACES))]}_{''.join(rng.choice(_CHARACTERS[:26], 2))}"
    value = "".join(rng.choice(_CHARACTERS, int(rng.integers(4, 9))))
    return f'{name} = "{value}"\n', f'assert {name} == "', f'{value}"\n'
