"""The safetensors files of a checkpoint's directory, as one mapping from tensor names to memory-mapped arrays."""

from __future__ import annotations

import dataclasses
import json
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
            CheckpointError: a file is truncated or no safetensors file, or lacks a tensor that the index says it has.
        """
        directory = Path(directory)
        where: dict[str, str] = {}
        for index in sorted(directory.glob("*.safetensors.index.json")):
            where |= json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values())) or sorted(file.name for file in directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {directory}; give a checkpoint's directory")
        if absent := [name for name in files if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{directory} lacks {_some(absent)}, which its index names; download it again")
        found: dict[str, Tensor] = {}
        for name in files:
            found |= _header(directory / name)
        if missing := sorted(set(where) - set(found)):
            raise CheckpointError(f"the index of {directory} names tensors that its files lack: {_some(missing)}")
        return cls({name: found[name] for name in (where or found)})


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
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if (dtype := _DTYPES.get(entry["dtype"])) is None:
            raise CheckpointError(f"{name} in {file} has dtype {entry['dtype']}; readable are {', '.join(_DTYPES)}")
        if 8 + length + end > size:
            raise CheckpointError(
                f"{file} is truncated: {name} ends at byte {8 + length + end}, the file at {size}; download it again"
            )
        shape = tuple(entry["shape"])
        if end - begin != np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64)):
            raise CheckpointError(f"{name} in {file} has {end - begin} bytes, which do not fit its shape {shape}")
        tensors[name] = Tensor(file, np.dtype(dtype), shape, 8 + length + begin)
    return tensors


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
