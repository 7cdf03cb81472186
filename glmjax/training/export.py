"""``python -m glmjax.training.export RUN OUT``: a run's last checkpoint as a published checkpoint, and how good it is."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tokenizers import Tokenizer

from glmjax.model import checkpoint
from glmjax.model.cache import ContiguousCache
from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.training import corpus
from glmjax.training.data import bits_per_byte, heldout_rows, tokenize
from glmjax.training.losses import cross_entropy
from glmjax.training.run import Run


def cast(model: Transformer, dtype: jnp.dtype) -> Transformer:
    """The model with its weights in another dtype; the routers' biases stay float32."""
    graph, weights = nnx.split(model)

    def converted(path: tuple, array: jax.Array) -> jax.Array:
        return array if "router_bias" in jax.tree_util.keystr(path) else array.astype(dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(converted, weights))


@jax.jit
def scored_nll(model: Transformer, ids_BT: jax.Array, start_BT: jax.Array, scored_BT: jax.Array) -> jax.Array:
    """Sum of −log p (nats) over the scored targets of a batch of `heldout_rows`."""
    inputs_BT = ids_BT[:, :-1]
    cache = ContiguousCache.create(model.config, *inputs_BT.shape, model.dtype, layered=False)
    step = cache.step(jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape), start_BT[:, :-1])
    out = model.backbone(inputs_BT, cache, step)
    nll_BT = cross_entropy(model.head(out.hidden_BTD), ids_BT[:, 1:])
    return jnp.sum(jnp.where(scored_BT[:, 1:], nll_BT, 0.0))


def heldout_bits_per_byte(model: Transformer, tokenizer: Tokenizer, *, seq_len: int, limit: int | None = None) -> float:
    """Over the held-out modules, every token scored once with at least half a row of context.

    Args:
        model: to measure.
        tokenizer: its own.
        seq_len: predictions per row.
        limit: measure the first so many documents only.
    """
    documents = corpus.load().held_out[:limit]
    tokens = tokenize(documents, tokenizer)
    rows = heldout_rows(tokens, batch_size=4, seq_len=seq_len, context=seq_len // 2)
    total = sum(float(scored_nll(model, r["ids_BT"], r["start_BT"], r["scored_BT"])) for r in rows)
    return bits_per_byte(total, documents)


def main(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    config: Path = Path("configs/nano.json"),
    seq_len: int = 1024,
) -> None:
    """Write the weights in bfloat16 beside the tokenizer that is in OUT already, and measure them as written.

    Args:
        run: folder of the run.
        out: directory with tokenizer.json; gets config.json and model.safetensors.
        config: the published form of the architecture.
        seq_len: context in tokens for the measurement.
    """
    trained = Run.resume(run, GlmConfig.from_dir(config))
    checkpoint.save(cast(trained.model, jnp.bfloat16), out, json.loads(config.read_text(encoding="utf-8")))
    size = sum(file.stat().st_size for file in out.iterdir())
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    bits = heldout_bits_per_byte(checkpoint.load(out, dtype=jnp.float32), tokenizer, seq_len=seq_len)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trained.model))
    print(f"step {int(trained.step)}: {parameters:,} parameters, {size / 2**20:.2f} MiB in {out}")
    print(f"held-out modules: {bits:.3f} bits per byte at {seq_len} tokens of context")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m glmjax.training.export")
