"""What an evaluation comes back with: a small table for a reader, the numbers for a program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Report(NamedTuple):
    """What an evaluation found.

    Attributes:
        text: to be printed.
        numbers: the same unrounded, as JSON knows it: names of Python's own types.
    """

    text: str
    numbers: dict[str, Any]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    lines = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join(map(line, lines))


def percent(share: float | None) -> str:
    """A share as it is printed; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"
