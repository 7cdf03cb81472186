"""Checkpoints: published safetensors in and out, an Orbax directory converted once, or random weights.

``python -m glmjax.model.checkpoint convert SRC DST`` makes the Orbax directory.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import tyro
from safetensors.numpy import save_file

from glmjax.model.assemble import (
    Placement,
    abstract,
    aligned,
    fill,
    has_mtp,
    mtp_prefix,
    named_weights,
    on_one_device,
    tensors,
)
from glmjax.model.config import GlmConfig
from glmjax.model.shards import CheckpointError, Shards
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source

LoadFormat = Literal["auto", "safetensors", "orbax", "dummy"]
Fp8 = Literal["keep", "dequantize"]

_ORBAX_WEIGHTS, _ORBAX_FACTS = "weights", "glmjax.json"
_BESIDE = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "README*",
)  # what a model's directory has beside weights
_CHUNK = 2**26  # bytes of an Orbax array that are stored, and read, at once


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    load_format: LoadFormat = "auto",
    fp8: Fp8 = "keep",
    mtp: bool | None = None,
    place: Placement = on_one_device,
    seed: int = 0,
) -> Transformer:
    """A model from its directory.

    Args:
        directory: with ``config.json`` and weights.
        dtype: of weights and activations, float32 or bfloat16; default float32 on CPU, else bfloat16.
        load_format: where the weights come from; "auto" takes Orbax where there is a converted directory, "dummy" makes
            random ones and needs the configuration only.
        fp8: an FP8 checkpoint's matrices stay FP8 in memory and are dequantised at use ("keep"), or as they are loaded.
        mtp: whether to have the MTP layer; default if the checkpoint has its tensors.
        place: where each weight lives, for sharded models.
        seed: of random weights.

    Raises:
        FileNotFoundError: no configuration or no weights.
        ConfigError: a configuration that cannot work.
        ValueError: an unknown load_format, fp8 or dtype.
        CheckpointError: weights that do not fit it, or cannot be read.
    """
    directory = Path(directory)
    config = GlmConfig.from_dir(directory)
    for field, value, kinds in (("load_format", load_format, LoadFormat), ("fp8", fp8, Fp8)):
        if value not in get_args(kinds):
            raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(get_args(kinds))}")
    dtype = _model_dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    keep = fp8 == "keep" and config.quantization is not None
    if load_format == "auto":
        load_format = "orbax" if (directory / _ORBAX_WEIGHTS).is_dir() else "safetensors"
    if load_format == "dummy":
        return _random(config, dtype, seed, config.num_nextn_predict_layers > 0 if mtp is None else mtp, keep, place)
    if load_format == "orbax":
        return _restore(directory, config, dtype, fp8, mtp, place)
    shards = Shards.open(directory)
    found = has_mtp(config, shards)
    if mtp and not found:
        raise CheckpointError(f"{directory} has no MTP layer ({mtp_prefix(config)}*); load without")
    if mtp is False and found:
        shards = Shards({name: t for name, t in shards.items() if not name.startswith(mtp_prefix(config))})
    model = abstract(config, dtype, mtp=found if mtp is None else mtp, fp8=keep)
    fill(model, shards, place)
    return model


def save(model: Transformer, directory: str | os.PathLike[str], raw_config: dict[str, Any]) -> None:
    """Write a model as a published checkpoint: ``model.safetensors`` and ``config.json``.

    Args:
        model: float32 or bfloat16; FP8 matrices are written dequantised.
        directory: made if need be.
        raw_config: the published form of its configuration; ``quantization_config`` is left out.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors(model).items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # the library makes it readable to its owner only
    raw_config = {key: value for key, value in raw_config.items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], *, dtype: Any = None) -> None:
    """Convert a published checkpoint to an Orbax directory, which restores faster and straight to shards.

    Args:
        source: directory of safetensors; FP8 stays FP8.
        target: a new directory; gets weights, configuration, tokenizer and template.
        dtype: of what is not FP8; default that of the checkpoint's norms.

    Raises:
        FileExistsError: the target exists and is not empty.
    """
    source, target = Path(source), Path(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; give a new directory")
    model = load(source, dtype=dtype or stored_dtype(source), load_format="safetensors")
    target.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = _arrays(model)
        cut = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,)) for name in arrays}
        checkpointer.save((target / _ORBAX_WEIGHTS).absolute(), arrays, save_args=cut)
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, target)
    kept = any(weight.scale is not None for weight in named_weights(model).values())
    facts = {"format": 1, "mtp": model.mtp is not None, "fp8": kept}
    (target / _ORBAX_FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def stored_dtype(directory: str | os.PathLike[str]) -> np.dtype:
    """The dtype in which a checkpoint's norms are stored: that of all that is not FP8 or a router's bias."""
    if (norm := Shards.open(directory).get("model.norm.weight")) is None:
        raise CheckpointError(f"{directory} lacks model.norm.weight: no checkpoint of a whole model")
    return norm.dtype


def _arrays(model: Transformer) -> dict[str, Any]:
    """Values and scales by path, flat and readable: what the Orbax directory holds."""
    arrays = {}
    for name, weight in named_weights(model).items():
        arrays[name] = weight.array
        if weight.scale is not None:
            arrays[name + ".scale"] = weight.scales
    return arrays


def _set_arrays(model: Transformer, arrays: dict[str, jax.Array]) -> None:
    for name, weight in named_weights(model).items():
        weight.values.set_value(arrays[name])
        if weight.scale is not None:
            weight.scale.set_value(arrays[name + ".scale"])


def _shardings(model: Transformer, place: Placement) -> dict[str, jax.sharding.Sharding]:
    letters = {name: weight.letters for name, weight in named_weights(model).items()}
    return {name: place(letters[name.removesuffix(".scale")], like.shape) for name, like in _arrays(model).items()}


def _random(config: GlmConfig, dtype: Any, seed: int, mtp: bool, fp8: bool, place: Placement) -> Transformer:
    """Random weights; of a sharded model, each part is made where it lives."""

    def draw() -> Transformer:
        return Transformer(config, dtype=dtype, rngs=random_source(seed), mtp=mtp, fp8=fp8)

    if place is on_one_device:
        return draw()
    model = abstract(config, dtype, mtp=mtp, fp8=fp8)
    _set_arrays(model, jax.jit(lambda: _arrays(draw()), out_shardings=_shardings(model, place))())
    return model


def _restore(
    directory: Path, config: GlmConfig, dtype: Any, fp8: Fp8, mtp: bool | None, place: Placement
) -> Transformer:
    facts_file = directory / _ORBAX_FACTS
    if not facts_file.is_file():
        raise FileNotFoundError(f"no {_ORBAX_FACTS} in {directory}; convert a checkpoint with glmjax.model.checkpoint")
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    if mtp and not facts["mtp"]:
        raise CheckpointError(f"{directory} was converted without an MTP layer; load without")
    if facts["fp8"] and fp8 == "dequantize":
        raise CheckpointError(f"{directory} was converted as FP8; load it with fp8='keep', or the published checkpoint")
    weights = (directory / _ORBAX_WEIGHTS).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        stored = dict(checkpointer.metadata(weights).item_metadata)
    whole = _arrays(abstract(config, dtype, mtp=facts["mtp"], fp8=facts["fp8"]))
    shapes = {name: tuple(array.shape) for name, array in stored.items()}
    if faults := [
        f"{name} is {shapes.get(name)}, must be {array.shape}"
        for name, array in whole.items()
        if shapes.get(name) != array.shape
    ]:
        raise CheckpointError(f"{weights} does not fit config.json beside it: {'; '.join(faults)}")
    # Without its MTP layer a model has the first entries of the same stacks.
    model = abstract(config, dtype, mtp=facts["mtp"] if mtp is None else mtp, fp8=facts["fp8"])
    shardings = _shardings(model, place)
    _set_arrays(model, {name: _read(weights, name, like, shardings[name]) for name, like in _arrays(model).items()})
    return model


def _read(weights: Path, name: str, like: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """One array of an Orbax directory, in steps along its first axis straight to where it lives.

    Orbax' own restore reads every array beside its final place, all at once: 1.7 times the weights at its peak.
    """
    kvstore = {"driver": "ocdbt", "base": weights.as_uri(), "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore}
    stored = ts.cast(ts.open(spec, open=True, read=True).result(), ts.dtype(like.dtype.name))

    def part(where: tuple[slice, ...]) -> np.ndarray:
        (begin, end), *rest = (s.indices(n)[:2] for s, n in zip(where, like.shape, strict=True))
        out = aligned([end - begin, *(stop - start for start, stop in rest)], like.dtype)
        step = max(1, _CHUNK * len(out) // max(out.nbytes, 1))
        inner = tuple(slice(*bounds) for bounds in rest)
        for n in range(0, len(out), step):
            rows = slice(begin + n, min(begin + n + step, end))
            ts.array(out[n : n + step]).write(stored[(rows, *inner)]).result()
        return out

    return jax.make_array_from_callback(like.shape, sharding, part)


def _model_dtype(dtype: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        dtype = repr(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype is {dtype}; a model runs in float32 or bfloat16")
    return dtype


app = tyro.extras.SubcommandApp()


@app.command(name="convert")
def _convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Convert a published checkpoint to an Orbax directory.

    Args:
        source: directory of safetensors; FP8 stays FP8.
        target: new directory; gets weights, configuration, tokenizer and template.
        dtype: of what is not FP8; default as stored.
    """
    convert(source, target, dtype=dtype)
    print(f"converted {source} to {target}")


@app.command(name="names")
def _names(source: tyro.conf.Positional[Path]) -> None:
    """List a checkpoint's tensors with dtype and shape.

    Args:
        source: directory of safetensors.
    """
    for name, tensor in sorted(Shards.open(source).items()):
        print(f"{name}  {tensor.dtype}  {list(tensor.shape)}")


if __name__ == "__main__":
    app.cli(prog="python -m glmjax.model.checkpoint")
