"""Masks of recorded dispatches, each kept once: within a string, the same one comes with every token."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from glmjax.serving.plan import Plan


@dataclasses.dataclass(frozen=True)
class Masks:
    """An array of masks.

    Attributes:
        shape: of the array, words included.
        names: of its masks, in order.
        rows: the masks by their names.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    rows: Mapping[str, bytes]

    def array(self) -> np.ndarray:
        """The array again, int32 [..., W]."""
        return np.frombuffer(b"".join(self.rows[name] for name in self.names), np.int32).reshape(self.shape)


def packed(plan: Plan, known: dict[str, bytes]) -> Plan:
    """A plan whose masks are `Masks`.

    Args:
        plan: as dispatched.
        known: masks by their names, to which its own are added.
    """

    def pack(allowed: np.ndarray | None) -> Masks | None:
        if allowed is None:
            return None
        rows = [row.tobytes() for row in allowed.reshape(-1, allowed.shape[-1])]
        names = tuple(hashlib.blake2b(row, digest_size=16).hexdigest() for row in rows)
        return Masks(
            allowed.shape, names, {name: known.setdefault(name, row) for name, row in zip(names, rows, strict=True)}
        )

    return _with(plan, pack)


def unpacked(plan: Plan) -> Plan:
    """A plan whose masks are arrays."""
    return _with(plan, lambda allowed: allowed.array() if isinstance(allowed, Masks) else allowed)


def told(plans: Iterable[Plan]) -> dict[str, str]:
    """The masks of some packed plans, for a file."""
    found: dict[str, bytes] = {}
    for plan in plans:
        for allowed in (plan.chunks and plan.chunks.allowed_BW, plan.guesses and plan.guesses.allowed_BTW):
            found |= allowed.rows if allowed else {}
    return {name: base64.b64encode(zlib.compress(row)).decode() for name, row in found.items()}


def read(of: Mapping[str, str]) -> dict[str, bytes]:
    """What `told` has told."""
    return {name: zlib.decompress(base64.b64decode(row)) for name, row in of.items()}


def _with(plan: Plan, pack: Any) -> Plan:
    chunks, guesses = plan.chunks, plan.guesses
    return dataclasses.replace(
        plan,
        chunks=chunks and dataclasses.replace(chunks, allowed_BW=pack(chunks.allowed_BW)),
        guesses=guesses and dataclasses.replace(guesses, allowed_BTW=pack(guesses.allowed_BTW)),
    )
