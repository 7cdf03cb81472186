"""Checkpoint tensors into weights: checked all at once, then copied part by part straight to where they live."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm

from glmjax.model.config import GlmConfig
from glmjax.model.names import Piece, pieces
from glmjax.model.shards import CheckpointError, Shards
from glmjax.model.transformer import Transformer
from glmjax.model.weights import Weight, random_source

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""From a weight's letters and shape to where it lives."""

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def on_one_device(letters: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The default `Placement`: everything on the default device."""
    del letters, shape
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def abstract(config: GlmConfig, dtype: Any, *, mtp: bool, fp8: bool) -> Transformer:
    """The model with shapes and dtypes for weights; nothing is allocated."""
    return nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=random_source(0), mtp=mtp, fp8=fp8))


def named_weights(model: Transformer) -> dict[str, Weight]:
    """Every weight by its path, e.g. ``attention.q_a_LQD``."""
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Weight):
            found[".".join(str(part) for part in path)] = node
    return dict(sorted(found.items()))


def has_mtp(config: GlmConfig, shards: Shards) -> bool:
    """Whether the checkpoint has any tensor of the MTP layer; Hugging Face's ``save_pretrained`` drops them all."""
    return config.num_nextn_predict_layers > 0 and any(name.startswith(mtp_prefix(config)) for name in shards)


def mtp_prefix(config: GlmConfig) -> str:
    """How the names of the MTP layer's tensors begin."""
    return f"model.layers.{config.num_hidden_layers}."


def fill(model: Transformer, shards: Shards, place: Placement = on_one_device) -> None:
    """Replace an abstract model's weights by those of a checkpoint.

    Every array is allocated once, aligned so that a CPU device takes it over without a copy, and filled from mapped
    files; a sharded array is filled shard by shard.

    Args:
        model: from `abstract`; changed in place.
        shards: the checkpoint.
        place: where each weight lives.

    Raises:
        CheckpointError: tensors are missing, left over, misshapen or of the wrong kind: all of them in one message.
    """
    weights = named_weights(model)
    parts: dict[str, list[_Part]] = defaultdict(list)
    for piece in pieces(model.config, mtp=model.mtp is not None):
        parts[piece.weight].append(_Part(piece, weights[piece.weight], shards, _block_of(model.config)))
    _check(parts, model, shards)
    total = sum(weight.array.size for weight in weights.values())
    with tqdm(total=total, unit="parameter", unit_scale=True, desc="loading", disable=None) as bar:
        for name, weight in weights.items():
            array = _assemble(parts[name], weight.array, weight.letters, place, _Part.copy_values)
            weight.values.set_value(array)
            if weight.scale is not None:
                weight.scale.set_value(_assemble(parts[name], weight.scales, weight.letters, place, _Part.copy_scale))
            bar.update(array.size)


def tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The model's weights under their published names and shapes, the inverse of `fill`; FP8 is dequantised.

    kv_b's halves are joined; dtypes stay as the weights have them, of what was FP8 it is the model's.
    """
    weights = named_weights(model)
    found: dict[str, Any] = {}
    halves: dict[str, list[np.ndarray]] = defaultdict(list)
    for piece in pieces(model.config, mtp=model.mtp is not None):
        weight = weights[piece.weight]
        part = np.asarray(weight.at(*piece.index, dtype=None if weight.scale is None else model.dtype))
        shape = _matrix_shape(weight, len(piece.index))
        if piece.row_range is None:
            found[piece.tensor] = part.reshape(shape)
        else:
            halves[piece.tensor].append(part)
    for name, (keys, values) in halves.items():
        found[name] = np.concatenate([keys, values], axis=1).reshape(-1, keys.shape[-1])
    return found


@dataclasses.dataclass(frozen=True)
class _Part:
    """A piece together with the weight it fills and the checkpoint it comes from."""

    piece: Piece
    weight: Weight
    shards: Shards
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.array.shape[len(self.piece.index) :]

    def expected(self) -> tuple[int, ...]:
        """The tensor's shape as the configuration demands it."""
        rows, *columns = _matrix_shape(self.weight, len(self.piece.index))
        if self.piece.row_range is not None:
            rows = self.shape[0] * self.piece.head_rows
        return (rows, *columns)

    def faults(self) -> list[tuple[str, str]]:
        """What keeps the tensor from being used: (kind, description)."""
        name = self.piece.tensor
        if (tensor := self.shards.get(name)) is None:
            return [("missing", name)]
        faults, shape = [], self.expected()
        if tensor.shape != shape:
            faults.append(("misshapen", f"{name} is {list(tensor.shape)}, must be {list(shape)}"))
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            faults.append(("not floating point", f"{name} is {tensor.dtype}"))
        elif tensor.dtype != _FP8:
            if self.weight.scale is not None:
                faults.append(("not FP8 (load with fp8='dequantize')", name))
        elif self.weight.columns == 0:
            faults.append(("FP8, but only matrices can be", name))
        elif self.block is None:
            faults.append(("FP8, but the configuration has no quantization_config", name))
        else:
            scales = tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))
            if (found := self.shards.get(name + "_scale_inv")) is None:
                faults.append(("missing", name + "_scale_inv"))
            elif found.shape != scales:
                faults.append(("misshapen", f"{name}_scale_inv is {list(found.shape)}, must be {list(scales)}"))
        return faults

    def copy_values(self, target: np.ndarray, where: tuple[slice, ...]) -> None:
        """Write the part's values at `where` (slices of the part) into the target."""
        tensor = self.shards[self.piece.tensor]
        source = self._as_part(tensor.read())
        if tensor.dtype != _FP8:
            target[...] = source[where]
        elif self.weight.scale is not None:
            target[...] = source[where].view(np.uint8)
        else:
            rows, columns = (np.arange(n) // b for n, b in zip(tensor.shape, self.block, strict=True))
            scale = self.shards[self.piece.tensor + "_scale_inv"].read()[rows][:, columns]
            target[...] = source[where].astype(np.float32) * self._as_part(scale)[where]

    def copy_scale(self, target: np.ndarray, where: tuple[slice, ...]) -> None:
        """Write the part's scales, cut to the weight's own blocks, at `where` (slices of the part's scales)."""
        lead = len(self.piece.index)
        widths, split = self.weight.block[lead:], len(self.shape) - self.weight.columns
        offset, stride = (self.piece.row_range or (0, 0))[0], self.piece.head_rows
        rows = _starts(self.shape[:split], widths[:split], stride) + offset
        columns = _starts(self.shape[split:], widths[split:], 0)
        source = self.shards[self.piece.tensor + "_scale_inv"].read()
        cut = source[rows // self.block[0]][:, columns // self.block[1]]
        target[...] = cut.reshape(self.weight.scales.shape[lead:])[where]

    def _as_part(self, tensor: np.ndarray) -> np.ndarray:
        if self.piece.row_range is None:
            return tensor.reshape(self.shape)
        begin, end = self.piece.row_range
        return tensor.reshape(self.shape[0], self.piece.head_rows, *self.shape[2:])[:, begin:end]


def _matrix_shape(weight: Weight, lead: int) -> tuple[int, ...]:
    """The published shape of a part: a vector, or rows × columns."""
    shape = weight.array.shape[lead:]
    if weight.columns == 0:
        return shape
    split = len(shape) - weight.columns
    return (int(np.prod(shape[:split])), int(np.prod(shape[split:])))


def _starts(lengths: tuple[int, ...], widths: tuple[int, ...], stride: int) -> np.ndarray:
    """Where in a flattened axis the blocks of its letters begin; `stride` is that of the next-to-last letter."""
    *outer, last = lengths
    positions = np.arange(0, last, widths[-1])
    if outer:
        positions = (np.arange(int(np.prod(outer)))[:, None] * (stride or last) + positions).reshape(-1)
    return positions


def _assemble(
    parts: list[_Part],
    like: Any,
    letters: str,
    place: Placement,
    copy: Callable[[_Part, np.ndarray, tuple[slice, ...]], None],
) -> jax.Array:
    lead = len(parts[0].piece.index)
    by_index: Mapping[tuple[int, ...], _Part] = {part.piece.index: part for part in parts}

    def block(where: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*s.indices(n)) for s, n in zip(where, like.shape, strict=True)]
        out = aligned([len(r) for r in ranges], like.dtype)
        for index in itertools.product(*(enumerate(r) for r in ranges[:lead])):
            target, source = tuple(i for i, _ in index), tuple(i for _, i in index)
            copy(by_index[source], out[target], where[lead:])
        return out

    return jax.make_array_from_callback(like.shape, place(letters, like.shape), block)


def aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which a CPU device can take over as it is."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def _block_of(config: GlmConfig) -> tuple[int, int] | None:
    return config.quantization.block if config.quantization else None


def _check(parts: Mapping[str, list[_Part]], model: Transformer, shards: Shards) -> None:
    """One error that names all that is wrong."""
    everything = [part for group in parts.values() for part in group]
    faults: dict[str, list[str]] = defaultdict(list)
    for part in everything:
        for kind, description in part.faults():
            faults[kind].append(description)
    used = {part.piece.tensor for part in everything}
    plain = {name for name in used if name in shards and shards[name].dtype != _FP8}
    known = used | {name + "_scale_inv" for name in used - plain}
    if extra := sorted(set(shards) - known):
        faults["unknown to this configuration"] = extra
    if faults:
        lines = [f"  {kind} ({len(set(names))}): {_few(sorted(set(names)))}" for kind, names in faults.items()]
        count = model.config.num_hidden_layers
        raise CheckpointError(f"the checkpoint does not fit its configuration of {count} layers:\n" + "\n".join(lines))


def _few(names: list[str], most: int = 20) -> str:
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")
