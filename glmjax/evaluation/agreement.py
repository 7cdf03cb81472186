"""``python -m glmjax.eval agreement``: what a narrower dtype or FP8 changes in a model's predictions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from glmjax.evaluation.arguments import Dtype, OnText, encode
from glmjax.evaluation.report import Report, table
from glmjax.evaluation.rows import ScoredRows
from glmjax.model.cache import row_dtype, whole_sequences
from glmjax.model.checkpoint import Fp8
from glmjax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Agreement(OnText):
    """Compare a model in a narrower dtype, with FP8 weights or with narrower cached rows, to itself in float32.

    The float32 model computes, caches and holds its weights in float32, those of an FP8 checkpoint dequantised. Both
    read the same true text, so that differences do not grow along it.

    Attributes:
        dtype: of weights and activations of the model that is compared.
        fp8: whether it keeps an FP8 checkpoint's matrices as FP8.
        kv_cache_dtype: of its cached rows; default as --dtype.
    """

    dtype: Dtype = "bfloat16"
    fp8: Fp8 = "keep"
    kv_cache_dtype: Dtype | Literal["fp8"] | None = None

    def run(self) -> Report:
        """See `Evaluation`."""
        documents, reference = self.documents(), self.glm("float32", "dequantize")
        rows = self.rows(reference, encode(reference, documents))
        found = agreement(reference.weights, self.glm(self.dtype, self.fp8).weights, rows, self.kv_cache_dtype)
        fp8 = f", FP8 weights as {self.fp8}" if reference.config.quantization else ""
        named = f"{self.dtype}, rows cached in {self.kv_cache_dtype or self.dtype}{fp8}"
        figures = [
            ("mean KL(float32 ‖ it)", f"{found.kl:.3g} nats"),
            ("largest KL", f"{found.largest_kl:.3g} nats"),
            ("same most likely token", f"{100 * found.top_1:.2f} %"),
            ("loss", f"{found.loss_difference:+.3g} nats per token"),
        ]
        title = f"{named}, against float32, over {found.tokens:,} tokens in rows of {self.seq_len}"
        text = f"{title}\n{table(figures)}"
        chosen = {"dtype": self.dtype, "kv_cache_dtype": self.kv_cache_dtype or self.dtype, "fp8": self.fp8}
        return Report(text, chosen | found._asdict())


class Agreed(NamedTuple):
    """How far another model's predictions are from a reference's, over tokens.

    Attributes:
        tokens: how many.
        kl: mean of KL(reference ‖ other), nats.
        largest_kl: of a single token.
        top_1: share of tokens for which both hold the same token most likely.
        loss_difference: the other's mean −log p of the true tokens less the reference's, nats.
    """

    tokens: int
    kl: float
    largest_kl: float
    top_1: float
    loss_difference: float


def agreement(
    reference: Transformer, other: Transformer, rows: Sequence[ScoredRows], kv_cache_dtype: Any = None
) -> Agreed:
    """Compare two models of one vocabulary on the scored tokens of rows.

    Args:
        reference: as it caches by default, in its own dtype.
        other: to compare.
        rows: texts.
        kv_cache_dtype: of rows that `other` caches; default its own dtype.
    """
    cached = row_dtype(kv_cache_dtype or other.dtype)
    kl, same, more, largest, tokens = [], 0, [], 0.0, 0
    for batch in tqdm(rows, desc="rows", disable=None):
        out = _compared(reference, other, batch.ids_BT, batch.start_BT, kv_cache_dtype=cached)
        scored_BT = batch.scored_BT[:, 1:]
        kl_N, same_N, more_N = (np.asarray(x, np.float64)[scored_BT] for x in out)
        kl.append(kl_N.sum())
        more.append(more_N.sum())
        same, tokens = same + int(same_N.sum()), tokens + len(kl_N)
        largest = max(largest, float(kl_N.max(initial=0.0)))
    return Agreed(tokens, float(sum(kl)) / tokens, largest, same / tokens, float(sum(more)) / tokens)


@functools.partial(jax.jit, static_argnames="kv_cache_dtype")
def _compared(
    reference: Transformer, other: Transformer, ids_BT: jax.Array, start_BT: jax.Array, kv_cache_dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each prediction KL(reference ‖ other), whether the most likely tokens are the same, and what more it costs."""

    def log_probs(model: Transformer, dtype: Any) -> jax.Array:
        inputs_BT, first_BT = ids_BT[:, :-1], start_BT[:, :-1]
        cache, step = whole_sequences(model.config, inputs_BT, dtype, first_BT, model_dtype=model.dtype)
        return jax.nn.log_softmax(model.head(model.backbone(inputs_BT, cache, step).hidden_BTD), axis=-1)

    p_BTV, q_BTV = log_probs(reference, reference.dtype), log_probs(other, kv_cache_dtype)
    kl_BT = jnp.sum(jnp.exp(p_BTV) * (p_BTV - q_BTV), axis=-1)
    picked_BT = jnp.take_along_axis(p_BTV - q_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
    return kl_BT, jnp.argmax(p_BTV, axis=-1) == jnp.argmax(q_BTV, axis=-1), picked_BT
