"""Checkpoints: published safetensors in and out, an Orbax directory converted once, or random weights.

``python -m glmjax.model.checkpoint convert SRC DST`` makes the Orbax directory.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from safetensors.numpy import save_file

from glmjax.model.assemble import Placement, abstract, fill, has_mtp, named_weights, on_one_device, tensors
from glmjax.model.config import GlmConfig
from glmjax.model.shards import CheckpointError, Shards
from glmjax.model.transformer import Transformer

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
        CheckpointError: weights that do not fit it, or cannot be read.
    """
    directory = Path(directory)
    config = GlmConfig.from_dir(directory)
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype is {dtype}; a model runs in float32 or bfloat16")
    keep = fp8 == "keep" and config.quantization is not None
    if load_format == "auto":
        load_format = "orbax" if (directory / _ORBAX_WEIGHTS).is_dir() else "safetensors"
    if load_format == "dummy":
        return Transformer(config, dtype=dtype, rngs=nnx.Rngs(seed), mtp=mtp, fp8=keep)
    if load_format == "orbax":
        return _restore(directory, config, dtype, mtp, place)
    shards = Shards.open(directory)
    found = has_mtp(config, shards)
    if mtp and not found:
        raise CheckpointError(f"{directory} has no MTP layer (model.layers.{config.num_hidden_layers}.*); load without")
    if mtp is False and found:
        prefix = f"model.layers.{config.num_hidden_layers}."
        shards = Shards({name: tensor for name, tensor in shards.items() if not name.startswith(prefix)})
    model = abstract(config, dtype, mtp=found if mtp is None else mtp, fp8=keep)
    fill(model, shards, place)
    return model


def save(model: Transformer, directory: str | os.PathLike[str], raw_config: dict[str, Any]) -> None:
    """Write a model as a published checkpoint: ``model.safetensors`` and ``config.json``.

    Args:
        model: float32 or bfloat16; FP8 matrices are written dequantised.
        directory: made if need be.
        raw_config: the published form of its configuration.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors(model).items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
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
        checkpointer.save((target / _ORBAX_WEIGHTS).absolute(), _arrays(model))
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, target)
    kept = any(weight.scale is not None for weight in named_weights(model).values())
    facts = {"format": 1, "mtp": model.mtp is not None, "fp8": kept}
    (target / _ORBAX_FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def stored_dtype(directory: str | os.PathLike[str]) -> np.dtype:
    """The dtype in which a checkpoint's norms are stored: that of all that is not FP8 or a router's bias."""
    return Shards.open(directory)["model.norm.weight"].dtype


def _arrays(model: Transformer) -> dict[str, jax.Array]:
    """Values and scales by path, flat and readable: what the Orbax directory holds."""
    arrays = {}
    for name, weight in named_weights(model).items():
        arrays[name] = weight.array
        if weight.scale is not None:
            arrays[name + ".scale"] = weight.scales
    return arrays


def _restore(directory: Path, config: GlmConfig, dtype: Any, mtp: bool | None, place: Placement) -> Transformer:
    facts_file = directory / _ORBAX_FACTS
    if not facts_file.is_file():
        raise FileNotFoundError(f"no {_ORBAX_FACTS} in {directory}; convert a checkpoint with glmjax.model.checkpoint")
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    if mtp and not facts["mtp"]:
        raise CheckpointError(f"{directory} was converted without an MTP layer; load without")
    model = abstract(config, dtype, mtp=facts["mtp"], fp8=facts["fp8"])
    wanted = {}
    for name, weight in named_weights(model).items():
        for suffix, array in (
            ("", weight.array),
            (".scale", weight.scales),
        ):
            if array is not None:
                sharding = place(weight.letters, array.shape)
                wanted[name + suffix] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((directory / _ORBAX_WEIGHTS).absolute(), wanted)
    for name, weight in named_weights(model).items():
        weight.values.set_value(restored[name])
        if weight.scale is not None:
            weight.scale.set_value(restored[name + ".scale"])
    return model


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
