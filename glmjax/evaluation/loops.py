"""Where generated text begins to repeat itself: there drafts are right for no merit."""

from collections.abc import Sequence

import numpy as np

WINDOW = 48
"""So many tokens must repeat …"""
PERIOD = 24
"""… with a period of at most so many, which is to say twice or more."""


def loop_start(tokens: Sequence[int] | np.ndarray) -> int | None:
    """The index of the first of `WINDOW` consecutive tokens that repeat with a period of at most `PERIOD`, or None."""
    tokens = np.asarray(tokens)
    starts = []
    for period in range(1, PERIOD + 1):
        equal = tokens[period:] == tokens[:-period]
        run = WINDOW - period  # equal pairs that a periodic window has
        if len(equal) >= run:
            pairs = np.convolve(equal, np.ones(run, int), mode="valid")
            starts += np.flatnonzero(pairs == run)[:1].tolist()
    return min(starts, default=None)


def before_loop(tokens: Sequence[int] | np.ndarray, most: int) -> int:
    """How many of the first `most` tokens come before a loop."""
    loop = loop_start(tokens)
    return min(len(tokens), most) if loop is None else min(len(tokens), most, loop)
