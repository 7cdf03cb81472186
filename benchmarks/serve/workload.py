"""Requests of a chat: a system prompt that many share, a question, an answer; lengths as chats have them."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SYSTEM, _QUESTION, _ANSWER = 8, (90, 0.8), (32, 0.6)
"""System prompts; medians of characters and of tokens, with the spread of their logarithms."""
_SYSTEM_CHARACTERS = (200, 900)
_MODULES = (
    "argparse",
    "ast",
    "asyncio/base_events",
    "collections/__init__",
    "csv",
    "datetime",
    "heapq",
    "json/encoder",
)


class Asked(NamedTuple):
    """A request.

    Attributes:
        number: which.
        text: the prompt.
        new_tokens: of the answer, exactly.
        seed: that it is sampled with.
        stream: whether tokens are wanted as they come.
    """

    number: int
    text: str
    new_tokens: int
    seed: int
    stream: bool


def workload(count: int, *, longest: tuple[int, int] = (2000, 160), seed: int = 0) -> list[Asked]:
    """So many requests; the same for the same seed.

    Args:
        count: of requests.
        longest: most characters of a prompt, and most tokens of an answer.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    texts = [text for text in map(_source, _MODULES) if len(text) > 2 * longest[0]]
    systems = [_piece(rng, texts, int(rng.integers(*_SYSTEM_CHARACTERS))) for _ in range(_SYSTEM)]
    asked = []
    for n in range(count):
        characters, tokens = (int(rng.lognormal(np.log(middle), spread)) for middle, spread in (_QUESTION, _ANSWER))
        text = f"{systems[rng.integers(_SYSTEM)]}\n# {n}\n{_piece(rng, texts, max(8, characters))}"
        asked.append(Asked(n, text[-longest[0] :], min(max(4, tokens), longest[1]), n, bool(rng.random() < 0.75)))
    return asked


def arrivals(count: int, rate: float, seed: int = 0) -> np.ndarray:
    """Seconds at which requests come, float64 [count]: a Poisson process of so many a second."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def _source(module: str) -> str:
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _piece(rng: np.random.Generator, texts: list[str], characters: int) -> str:
    text = texts[rng.integers(len(texts))]
    begin = int(rng.integers(0, len(text) - characters))
    return text[begin : begin + characters]
