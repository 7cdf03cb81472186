"""Compiled programs are mapped in many pieces each; a process may have 65,530, and beyond that XLA crashes as it compiles."""

from pathlib import Path

MAPS = Path("/proc/self/maps")


def crowded() -> bool:
    """Whether half of them are taken."""
    return MAPS.exists() and MAPS.read_bytes().count(b"\n") > 32_000
