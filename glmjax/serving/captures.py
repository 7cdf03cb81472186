"""What hooks have captured of a sequence: pieces as dispatches bring them, each position once, put together for a reader."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Captures:
    """Of P tokens.

    Attributes:
        positions: int32 [P], ascending: where in the sequence they stand, prompt included.
        layers: by layer, what the capture has returned: a tree of NumPy arrays [P, …], or None.
    """

    positions: np.ndarray
    layers: dict[int, Any]


class Pieces:
    """Captures of one sequence as they come."""

    def __init__(self):
        self._pieces: list[tuple[np.ndarray, dict[int, Any]]] = []
        self._seen: set[int] = set()

    def copy(self) -> Pieces:
        """As they are now."""
        other = Pieces()
        other._pieces = list(self._pieces)
        return other

    def add(self, begin: int, captured: dict[int, Any]) -> None:
        """Keep what is new of a stretch; a position that is read again, after a preemption or a fault, is not.

        Args:
            begin: position of its first token.
            captured: by layer, a tree of arrays [n, …], which are copied.
        """
        count = max((len(leaf) for leaf in jax.tree.leaves(captured)), default=0)
        new = [n for n in range(count) if begin + n not in self._seen]
        if new:
            positions = np.int32(new) + begin
            self._seen.update(positions.tolist())
            self._pieces.append((positions, jax.tree.map(lambda leaf: np.asarray(leaf)[new], captured)))

    def joined(self) -> Captures:
        """In order.

        Raises:
            ValueError: shapes beyond the first axis differ between programs.
        """
        if not self._pieces:
            return Captures(np.zeros(0, np.int32), {})
        positions, trees = zip(*self._pieces, strict=True)
        positions = np.concatenate(positions)
        order = np.argsort(positions, kind="stable")
        try:
            layers = jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *trees)
        except ValueError as error:
            raise ValueError(
                f"captures differ in shape from program to program ({error}); return arrays whose axes beyond [B, T] are "
                "always the same, e.g. glmjax.serving.hooks.selected(view, index_topk) for selections"
            ) from error
        return Captures(positions[order], layers)
