"""Which GPUs each of several workers gets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def devices() -> list[str]:
    """GPUs that this process may use, without asking them."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


def devices_of(replicas: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """What each worker's environment says of GPUs: every one gets as many.

    Args:
        replicas: workers.
        devices: GPUs that there are; none on a CPU.

    Raises:
        ValueError: there are too few.
    """
    if not devices:
        return [{}] * replicas
    if len(devices) < replicas:
        raise ValueError(f"--replicas {replicas} exceeds the {len(devices)} GPUs there are; lower it")
    each = len(devices) // replicas
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[each * i : each * (i + 1)])} for i in range(replicas)]
