"""The safetensors files of a checkpoint's directory, as one mapping from tensor names to memory-mapped arrays."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names every file or tensor concerned."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        file: its safetensors file.
        dtype: NumPy's, of ml_dtypes where NumPy has none.
        shape: as stored.
        offset: of its first byte in the file.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor, memory-mapped: only what is used of it is read, into pages that are the file's own."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


class Shards(dict[str, Tensor]):
    """All tensors of a checkpoint by name.

    The ``safetensors`` package reads whole slices into memory, and none of FP8 into NumPy; a mapping lets the loader
    copy any part of any tensor straight to where it belongs.
    """

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Shards:
        """Read the headers of every file that ``*.safetensors.index.json`` names, or of every file there is.

        Raises:
            FileNotFoundError: no safetensors file, or one that the index names is missing.
            CheckpointError: files are truncated or no safetensors files, or lack tensors that the index says they have.
        """
        directory = Path(directory)
        where: dict[str, str] = {}
        for index in sorted(directory.glob("*.safetensors.index.json")):
            try:
                where |= json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index} is no index: {error!r}; it must be JSON with weight_map") from error
        files = sorted(set(where.values())) or sorted(file.name for file in directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {directory}; give a checkpoint's directory")
        if absent := [name for name in files if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{directory} lacks {_some(absent)}, which its index names; download it again")
        found: dict[str, dict[str, Tensor]] = {}
        faults: list[str] = []
        for name in files:
            try:
                found[name] = _header(directory / name)
            except CheckpointError as error:
                faults.append(str(error))
        if faults:
            raise CheckpointError("\n".join(faults))
        if missing := sorted(f"{name} in {file}" for name, file in where.items() if name not in found[file]):
            raise CheckpointError(f"the index of {directory} names tensors that its files lack: {_some(missing)}")
        where = where or {name: file for file, tensors in found.items() for name in tensors}
        return cls({name: found[file][name] for name, file in where.items()})


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: 8 bytes of length, a JSON header, then the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{file} is truncated or no safetensors file: {size} bytes; download it again")
        try:
            entries = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file} is no safetensors file: its header is not JSON ({error})") from error
    tensors, unreadable, beyond, misfits = {}, [], [], []
    try:
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
            if (dtype := _DTYPES.get(entry["dtype"])) is None:
                unreadable.append(f"{name} is {entry['dtype']}")
                continue
            if 8 + length + end > size:
                beyond.append(f"{name} ends at byte {8 + length + end}")
            if end - begin != np.dtype(dtype).itemsize * math.prod(shape):
                misfits.append(f"{name} {list(shape)} has {end - begin} bytes")
            tensors[name] = Tensor(file, np.dtype(dtype), shape, 8 + length + begin)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is no safetensors file: its header describes no tensors ({error!r})") from error
    faults = []
    if unreadable:
        faults.append(f"{file} has dtypes other than {', '.join(_DTYPES)}: {_some(unreadable)}")
    if beyond:
        faults.append(f"{file} is truncated: it has {size} bytes, but {_some(beyond)}; download it again")
    if misfits:
        faults.append(f"{file} has tensors whose bytes do not fit their shapes: {_some(misfits)}")
    if faults:
        raise CheckpointError("\n".join(faults))
    return tensors


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
