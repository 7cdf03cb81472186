"""``python -m glmjax.training.heldout [MODEL]``: bits per byte on the modules that training never saw."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from tokenizers import Tokenizer

from glmjax.model import checkpoint
from glmjax.model.cache import whole_sequences
from glmjax.model.transformer import Transformer
from glmjax.nano import NANO
from glmjax.training import corpus
from glmjax.training.data import bits_per_byte, heldout_rows, tokenize
from glmjax.training.losses import cross_entropy


@jax.jit
def scored_nll(model: Transformer, ids_BT: jax.Array, start_BT: jax.Array, scored_BT: jax.Array) -> jax.Array:
    """Sum of −log p (nats) over the scored targets of a batch of `heldout_rows`."""
    inputs_BT = ids_BT[:, :-1]
    cache, step = whole_sequences(model.config, inputs_BT, model.dtype, start_BT[:, :-1])
    out = model.backbone(inputs_BT, cache, step)
    nll_BT = cross_entropy(model.head(out.hidden_BTD), ids_BT[:, 1:])
    return jnp.sum(jnp.where(scored_BT[:, 1:], nll_BT, 0.0))


def heldout_bits_per_byte(model: Transformer, tokenizer: Tokenizer, *, seq_len: int) -> float:
    """Over the held-out modules, every token scored once with at least half a row of context.

    Args:
        model: to measure.
        tokenizer: its own.
        seq_len: predictions per row.
    """
    documents = corpus.load().held_out
    tokens = tokenize(documents, tokenizer)
    rows = heldout_rows(tokens, batch_size=4, seq_len=seq_len, context=seq_len // 2)
    total = sum(float(scored_nll(model, r["ids_BT"], r["start_BT"], r["scored_BT"])) for r in rows)
    return bits_per_byte(total, documents)


def main(model: tyro.conf.Positional[Path] = NANO, seq_len: int = 1024) -> None:
    """Measure a model that was trained on the standard library; default the one in the box.

    Args:
        model: directory of the checkpoint.
        seq_len: tokens in a row, of which at least half are context.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    bits = heldout_bits_per_byte(checkpoint.load(model, dtype=jnp.float32), tokenizer, seq_len=seq_len)
    print(f"held-out modules: {bits:.3f} bits per byte in rows of {seq_len} tokens, at least half of them context")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m glmjax.training.heldout")
