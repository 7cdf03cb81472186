"""What evaluations are told: which checkpoint, which texts, where to write the numbers."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from glmjax.evaluation.report import Report
from glmjax.evaluation.rows import ScoredRows, scored_rows
from glmjax.glm import GLM, load
from glmjax.model.checkpoint import Fp8, LoadFormat
from glmjax.nano import NANO
from glmjax.training import corpus
from glmjax.training.corpus import Document

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Evaluation(abc.ABC):
    """What every subcommand takes.

    Attributes:
        model_path: directory of a checkpoint; default the model in the box.
        tokenizer_path: directory of tokenizer.json, where it is not beside the weights.
        load_format: where weights come from.
        json: also write the numbers to this file.
    """

    model_path: Path = NANO
    tokenizer_path: Path | None = None
    load_format: LoadFormat = "auto"
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None

    @abc.abstractmethod
    def run(self) -> Report:
        """Measure.

        Raises:
            ValueError: it cannot be measured as asked for; says what to change.
            OSError: a file cannot be read.
        """

    def glm(self, dtype: Dtype | None, fp8: Fp8 = "keep") -> GLM:
        """The checkpoint with its tokenizer."""
        loaded = load(
            self.model_path, dtype=dtype, load_format=self.load_format, fp8=fp8, tokenizer_path=self.tokenizer_path
        )
        if loaded.tokenizer is None:
            raise ValueError(f"no tokenizer.json in {self.model_path}; say where it is with --tokenizer-path")
        return loaded


@dataclasses.dataclass(frozen=True)
class OnText(Evaluation):
    """What subcommands that read whole texts take.

    Attributes:
        files: texts to measure on, UTF-8.
        stdlib: measure on the modules of the standard library that the model in the box never saw.
        seq_len: tokens in a row, of which at least half are context except at a text's beginning.
        batch_size: rows at a time.
    """

    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")]] = ()
    stdlib: tyro.conf.FlagCreatePairsOff[bool] = False
    seq_len: int = 1024
    batch_size: int = 4

    def documents(self) -> tuple[Document, ...]:
        """The texts."""
        if self.stdlib == bool(self.files):
            raise ValueError("give files to measure on, or --stdlib instead of them")
        return corpus.load().held_out if self.stdlib else read(self.files)

    def rows(self, glm: GLM, tokens: Sequence[np.ndarray]) -> list[ScoredRows]:
        """Tokens of texts in rows, every token scored once."""
        limit = glm.config.max_position_embeddings
        if not 1 <= self.seq_len <= limit or self.batch_size < 1:
            raise ValueError(
                f"rows of {self.seq_len} tokens, {self.batch_size} at a time, cannot be; the model's context is {limit}: "
                "set --seq-len to at most that and --batch-size to at least 1"
            )
        shape = {"batch_size": self.batch_size, "seq_len": self.seq_len, "context": max(1, self.seq_len // 2)}
        return list(scored_rows(tokens, end_token(glm), **shape))


def read(files: Sequence[Path]) -> tuple[Document, ...]:
    """Text files as documents.

    Raises:
        ValueError: one is not UTF-8.
        OSError: one cannot be read.
    """
    documents = []
    for file in files:
        try:
            documents.append(Document(str(file), file.read_bytes().decode()))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 at byte {error.start}; give text files") from None
    return tuple(documents)


def read_or_held_out(files: Sequence[Path]) -> tuple[Document, ...]:
    """Text files as documents; without any the held-out modules of the standard library."""
    return read(files) if files else corpus.load().held_out


def encode(glm: GLM, documents: Sequence[Document]) -> list[np.ndarray]:
    """The tokens of each text, int32; names of control tokens in a text are text.

    Raises:
        ValueError: there are none.
    """
    tokens = [np.asarray(glm.tokenizer.encode(text.text, parse_special=False), np.int32) for text in documents]
    if not any(map(len, tokens)):
        raise ValueError("the texts are empty; give some to measure on")
    return tokens


def end_token(glm: GLM) -> int:
    """The token that stands between documents: the first of the checkpoint's end-of-sequence tokens.

    Raises:
        ValueError: it names none.
    """
    if not glm.config.eos_token_id:
        raise ValueError("the checkpoint's config.json has no eos_token_id, which stands between texts; add it")
    return glm.config.eos_token_id[0]
