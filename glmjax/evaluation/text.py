"""``python -m glmjax.eval text``: how well a model predicts texts, in bits per byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from tqdm import tqdm

from glmjax.evaluation.arguments import Dtype, OnText, encode
from glmjax.evaluation.compression import xz_size, xz_size_after
from glmjax.evaluation.report import Report, table
from glmjax.evaluation.rows import ScoredRows
from glmjax.model.cache import whole_sequences
from glmjax.model.checkpoint import Fp8
from glmjax.model.transformer import Transformer, densely
from glmjax.training import corpus
from glmjax.training.losses import cross_entropy

Attention = Literal["sparse", "dense"]


@dataclasses.dataclass(frozen=True)
class Text(OnText):
    """Bits per byte, perplexity and tokens per byte of texts; every token is scored once.

    Bits per byte compare models of any vocabulary, and with compressors: `xz -9` of the same bytes is printed beside
    them, with --stdlib also where xz has read the training files before.

    Attributes:
        attention: what tokens attend to: "sparse", what the indexer selects; "dense", everything visible, with the same
            weights. With both the difference is printed.
        dtype: of weights and activations; default float32 on CPU, bfloat16 elsewhere.
        fp8: keep an FP8 checkpoint's matrices as FP8, or dequantise them while loading.
    """

    attention: tuple[Attention, ...] = ("sparse",)
    dtype: Dtype | None = None
    fp8: Fp8 = "keep"

    def run(self) -> Report:
        """See `Evaluation`."""
        if not self.attention or len(set(self.attention)) < len(self.attention):
            raise ValueError("--attention takes sparse, dense or both, each once")
        documents, glm = self.documents(), self.glm(self.dtype, self.fp8)
        tokens, num_bytes = encode(glm, documents), sum(document.num_bytes for document in documents)
        rows, models = self.rows(glm, tokens), {"sparse": glm.weights, "dense": densely(glm.weights)}
        scores = {
            attention: Score(total_nll(models[attention], rows), sum(map(len, tokens)), num_bytes)
            for attention in self.attention
        }
        sizes = {"xz -9": xz_size(documents)}
        if self.stdlib:
            sizes["xz -9 after the training files"] = xz_size_after(documents, corpus.load().training)
        return _report(len(documents), self.seq_len, scores, sizes)


@dataclasses.dataclass(frozen=True)
class Score:
    """How well texts were predicted.

    Attributes:
        nll: sum of −log p over all tokens, nats.
        tokens: how many.
        num_bytes: length of the texts in UTF-8.
    """

    nll: float
    tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """What the model needs for a byte of text."""
        return self.nll / (math.log(2) * self.num_bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.loss)

    @property
    def tokens_per_byte(self) -> float:
        """How finely the vocabulary cuts the texts."""
        return self.tokens / self.num_bytes


def total_nll(model: Transformer, rows: Sequence[ScoredRows]) -> float:
    """Sum of −log p over all scored tokens, nats."""
    batches = tqdm(rows, desc="rows", disable=None)
    return math.fsum(float(_nll(model, batch.ids_BT, batch.start_BT, batch.scored_BT)) for batch in batches)


@jax.jit
def _nll(model: Transformer, ids_BT: jax.Array, start_BT: jax.Array, scored_BT: jax.Array) -> jax.Array:
    inputs_BT, target_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    cache, step = whole_sequences(model.config, inputs_BT, model.dtype, start_BT[:, :-1])
    nll_BT = cross_entropy(model.head(model.backbone(inputs_BT, cache, step).hidden_BTD), target_BT)
    return jnp.sum(jnp.where(scored_BT[:, 1:], nll_BT, 0.0))


def _report(texts: int, seq_len: int, scores: dict[Attention, Score], sizes: dict[str, int]) -> Report:
    any_score = next(iter(scores.values()))
    rows = [("", "bits per byte", "perplexity", "nats per token")]
    rows += [
        (f"{attention} attention", f"{s.bits_per_byte:.3f}", f"{s.perplexity:.3f}", f"{s.loss:.4f}")
        for attention, s in scores.items()
    ]
    rows += [(name, f"{8 * size / any_score.num_bytes:.3f}", "–", "–") for name, size in sizes.items()]
    lines = [
        f"{texts} text{'s' * (texts != 1)}, {any_score.num_bytes:,} bytes, {any_score.tokens:,} tokens "
        f"({any_score.tokens_per_byte:.4f} per byte), in rows of {seq_len}",
        table(rows),
    ]
    numbers: dict[str, Any] = {
        "texts": texts,
        "bytes": any_score.num_bytes,
        "tokens": any_score.tokens,
        "tokens_per_byte": any_score.tokens_per_byte,
        "attention": {
            attention: {"bits_per_byte": s.bits_per_byte, "perplexity": s.perplexity, "loss": s.loss}
            for attention, s in scores.items()
        },
        "compressed": {name: {"bytes": n, "bits_per_byte": 8 * n / any_score.num_bytes} for name, n in sizes.items()},
    }
    if len(scores) == 2:
        numbers["dense_against_sparse"] = scores["dense"].loss / scores["sparse"].loss - 1
        lines.append(f"dense against sparse: {100 * numbers['dense_against_sparse']:+.3f} % nats per token")
    return Report("\n".join(lines), numbers)
