"""What a run measures now and then beside its losses: bits per byte on modules it never sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glmjax.evaluation.rows import scored_rows
from glmjax.evaluation.text import Score, total_nll
from glmjax.model.tokenizer import Tokenizer
from glmjax.model.transformer import Transformer
from glmjax.training.corpus import Document
from glmjax.training.data import tokenize


class Probe:
    """Bits per byte on evenly spaced rows of documents: a sample that takes seconds.

    Args:
        documents: that the run never sees.
        tokenizer: of the model.
        batches: how many batches of four rows.
        seq_len: tokens in a row, of which half are context.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, *, batches: int = 6, seq_len: int = 1024):
        tokens = tokenize(documents, tokenizer.raw)
        texts = [tokens[i][:-1] for i in range(len(tokens))]
        rows = list(scored_rows(texts, tokens.end_id, batch_size=4, seq_len=seq_len, context=seq_len // 2))
        self._rows = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(batches, len(rows)))]
        self._scored = sum(int(row.scored_BT.sum()) for row in self._rows)
        bytes_per_token = sum(document.num_bytes for document in documents) / sum(map(len, texts))
        self._num_bytes = round(self._scored * bytes_per_token)

    def __call__(self, model: Transformer) -> dict[str, float]:
        """Of a model, with what it selects."""
        score = Score(total_nll(model, self._rows), self._scored, self._num_bytes)
        return {"held_out_bits_per_byte": round(score.bits_per_byte, 4)}
