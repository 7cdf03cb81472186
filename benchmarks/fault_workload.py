"""Requests for the fault campaign: prompts that share long prefixes, of the kinds that drafts fare well and badly with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax.glm import GLM
from glmjax.model.infill import BlankTokens
from glmjax.model.sampling_params import SamplingParams

KINDS = ("code", "copying", "boilerplate", "infilling")


class Asked(NamedTuple):
    """A request.

    Attributes:
        kind: one of `KINDS`.
        ids: the prompt.
        params: with a seed.
    """

    kind: str
    ids: tuple[int, ...]
    params: SamplingParams


class Workload:
    """Request n of as many as one likes: always the same.

    Args:
        glm: the model.
        texts: token ids of texts, each longer than a document.
        documents: how many prefixes there are.
        length: tokens of a prefix.
        new_tokens: fewest and most tokens of an answer.
        seed: of everything.
    """

    def __init__(
        self,
        glm: GLM,
        texts: Sequence[np.ndarray],
        *,
        documents: int,
        length: int,
        new_tokens: tuple[int, int],
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        long = [text for text in texts if len(text) > 2 * length]
        if not long:
            raise ValueError(f"no text has more than {2 * length} tokens, two prefixes; give longer texts")
        self._documents = []
        for n in range(documents):
            text = long[n % len(long)]
            begin = int(rng.integers(0, len(text) - 2 * length + 1))
            self._documents.append(text[begin : begin + 2 * length].tolist())
        self._length, self._new_tokens, self._seed = length, new_tokens, seed
        self._blanks = BlankTokens.of(glm.tokenizer) if glm.tokenizer else None

    def __getitem__(self, n: int) -> Asked:
        rng = np.random.default_rng((self._seed, n))
        kind = KINDS[int(rng.choice(len(KINDS), p=(0.7, 0.1, 0.1, 0.1)))]
        document, length = self._documents[int(rng.integers(len(self._documents)))], self._length
        tail = int(rng.integers(1, length // 2))
        head, other = document[:length], document[length : length + tail]
        stops: tuple[int, ...] = ()
        if kind == "copying":
            ids = [*head, *head[-tail:], *head[-tail : -tail // 2]]
        elif kind == "boilerplate":
            line = other[: int(rng.integers(4, 12))]
            ids = [*head, *line * (1 + tail // max(1, len(line)))]
        elif kind == "infilling" and self._blanks:
            ids, stops = self._blanks.prompt(head, other), (self._blanks.eop,)
        else:
            kind, ids = "code", [*head, *other]
        fewest, most = self._new_tokens
        params = SamplingParams(
            temperature=0.0 if rng.random() < 0.2 else 0.8,
            top_p=0.95,
            seed=int(rng.integers(2**31)),
            max_new_tokens=int(rng.integers(fewest, most + 1)),
            stop_token_ids=stops,
        )
        return Asked(kind, tuple(ids), params)
