"""``python -m glmjax.training.export RUN OUT``: a run's last checkpoint as a published checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from glmjax.model import checkpoint
from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.training.run import Run


def cast(model: Transformer, dtype: Any) -> Transformer:
    """The model with its weights in another dtype; the routers' biases stay float32."""
    graph, weights = nnx.split(model)

    def converted(path: tuple, array: jax.Array) -> jax.Array:
        return array if "router_bias" in jax.tree_util.keystr(path) else array.astype(dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(converted, weights))


def main(
    run: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], config: Path = Path("configs/nano.json")
) -> None:
    """Write the weights in bfloat16 beside the tokenizer.

    Args:
        run: folder of the run.
        out: directory of the model; gets config.json and model.safetensors.
        config: the published form of the architecture.
    """
    trained = Run.resume(run, GlmConfig.from_dir(config))
    checkpoint.save(cast(trained.model, jnp.bfloat16), out, json.loads(config.read_text(encoding="utf-8")))
    size = sum(file.stat().st_size for file in out.iterdir())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained.model))
    print(f"step {int(trained.step)}: {parameters:,} parameters, {size / 2**20:.2f} MiB in {out}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m glmjax.training.export")
