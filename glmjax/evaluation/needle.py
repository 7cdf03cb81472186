"""``python -m glmjax.eval needle``: whether a model finds a line again that stands far back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32
from tqdm import tqdm

from glmjax.evaluation.arguments import Dtype, Evaluation, encode, read_or_held_out
from glmjax.evaluation.report import Report, percent, table
from glmjax.model.cache import whole_sequences
from glmjax.model.checkpoint import Fp8
from glmjax.model.tokenizer import Tokenizer
from glmjax.model.transformer import LayerView, Transformer
from glmjax.pallas import selection
from glmjax.training.tasks import planted_line

_ROOM = 192  # tokens of a row beside the distance: planted line, question and answer, and filler before the line
_LINE = 64  # tokens within which the filler between line and question should reach the end of a line
_BATCH = 4  # rows at a time


@dataclasses.dataclass(frozen=True)
class Needle(Evaluation):
    """Plant a line `name = "value"` in code and ask for the value, `assert name == "`, some distance after it.

    Names and values are random, so that nothing but attention to the line can tell. A trial counts as retrieved where
    greedy decoding gives the whole value and what ends it.

    Attributes:
        distances: tokens between line and question, up to one line more; beyond the model's index_topk its indexers
            must find the line.
        trials: of each distance.
        filler: text files to plant lines in; default modules of the standard library that the model in the box never
            saw.
        seed: of names, values and places.
        dtype: of weights and activations; default float32 on CPU, bfloat16 elsewhere.
        fp8: keep an FP8 checkpoint's matrices as FP8, or dequantise them while loading.
    """

    distances: tuple[int, ...] = (128, 300, 600, 1200, 2400)
    trials: int = 20
    filler: tuple[Path, ...] = ()
    seed: int = 0
    dtype: Dtype | None = None
    fp8: Fp8 = "keep"

    def run(self) -> Report:
        """See `Evaluation`."""
        if not self.distances or min(self.distances) < 1 or self.trials < 1:
            raise ValueError(f"distances {self.distances} and trials {self.trials} must be at least 1")
        glm = self.glm(self.dtype, self.fp8)
        limit, longest = glm.config.max_position_embeddings, max(self.distances) + _ROOM
        if longest > limit:
            raise ValueError(
                f"distance {max(self.distances)} takes rows of {longest} tokens, beyond the model's context of {limit}; "
                f"set --distances to at most {limit - _ROOM}"
            )
        haystack = Haystack(glm.tokenizer, encode(glm, read_or_held_out(self.filler)))
        results = {}
        for distance in tqdm(self.distances, desc="distances", disable=None):
            rng = np.random.default_rng([self.seed, distance])
            results[distance] = retrieved(glm.weights, [haystack.trial(rng, distance) for _ in range(self.trials)])
        return _report(glm.config.index_topk, self.trials, results)


class Trial(NamedTuple):
    """A row of tokens that ends with the answer.

    Attributes:
        ids: the row, int32.
        line: where the planted line is.
        answer: where the answer is.
    """

    ids: np.ndarray
    line: slice
    answer: slice


class Retrieved(NamedTuple):
    """Of trials.

    Attributes:
        right: whether the answer was given, of each.
        selected: share of the planted line's tokens that some layer selected for the answer's first token.
    """

    right: Bool[np.ndarray, "trials"]
    selected: Float[np.ndarray, "trials"]


class Haystack:
    """Texts to plant lines in.

    Args:
        tokenizer: of the texts.
        documents: their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[np.ndarray]):
        self._tokenizer, self._documents = tokenizer, documents
        used = {int(token) for document in documents for token in np.unique(document)}
        self._ends_line = np.array(sorted(token for token in used if tokenizer.decode([token]).endswith("\n")))

    def trial(self, rng: np.random.Generator, distance: int) -> Trial:
        """A line planted behind the end of a line in a text, and asked for at an end of a line `distance` or more after.

        All rows of a distance are equally long.

        Raises:
            ValueError: no text is long enough.
        """
        line, question, answer = (np.array(self._tokenizer.encode(text), np.int32) for text in planted_line(rng))
        text, begin, end = self._stretch(rng, distance)
        lead = distance + _ROOM - (len(line) + end - begin + len(question) + len(answer))
        parts = [text[begin - lead : begin], line, text[begin:end], question, answer]
        edges = np.cumsum([0, *map(len, parts)])
        return Trial(np.concatenate(parts), slice(edges[1], edges[2]), slice(edges[4], edges[5]))

    def _stretch(self, rng: np.random.Generator, distance: int) -> tuple[np.ndarray, int, int]:
        """A text and two places in it, `distance` and up to one line apart."""
        rooms = np.array([max(0, len(document) - distance - _ROOM - _LINE) for document in self._documents])
        if not rooms.any():
            longest = max(map(len, self._documents))
            raise ValueError(
                f"distance {distance} needs a text of more than {distance + _ROOM + _LINE} tokens, the longest has "
                f"{longest}; give longer files with --filler, or a shorter distance"
            )
        text = self._documents[rng.choice(len(rooms), p=rooms / rooms.sum())]
        starts = np.arange(_ROOM, len(text) - distance - _LINE)
        after_line = starts[np.isin(text[starts - 1], self._ends_line)]
        begin = int(rng.choice(after_line if len(after_line) else starts))
        ends = begin + distance + np.arange(_LINE)
        line_ends = ends[np.isin(text[ends - 1], self._ends_line)]
        return text, begin, int(line_ends[0] if len(line_ends) else ends[0])


def retrieved(model: Transformer, trials: Sequence[Trial]) -> Retrieved:
    """Which answers greedy decoding gives: those in which every token is the most likely one after those before it.

    Args:
        model: to ask.
        trials: rows of one length.
    """
    longest = max(trial.answer.stop - trial.answer.start for trial in trials)
    found = []
    for rows in _batches(trials):
        ids_BT = np.stack([row.ids for row in rows])
        answer_BA = np.full((len(rows), longest), -1, np.int32)
        line_BT = np.zeros(ids_BT.shape, bool)
        for b, row in enumerate(rows):
            answer_BA[b, : row.answer.stop - row.answer.start] = np.arange(row.answer.start, row.answer.stop)
            line_BT[b, row.line] = True
        found.append(_recall(model, ids_BT, line_BT, answer_BA))
    right, selected = (np.concatenate(parts)[: len(trials)] for parts in zip(*found, strict=True))
    return Retrieved(right, selected)


def _batches(trials: Sequence[Trial]) -> Iterator[Sequence[Trial]]:
    """Equally many at a time; the last ones are filled up with the first."""
    size = min(_BATCH, len(trials))
    for begin in range(0, len(trials), size):
        batch = trials[begin : begin + size]
        yield [*batch, *trials[: size - len(batch)]]


@jax.jit
def _recall(
    model: Transformer,
    ids_BT: Int[jax.Array, "B T"],
    line_BT: Bool[jax.Array, "B T"],
    answer_BA: Int32[jax.Array, "B A"],
) -> tuple[Bool[jax.Array, "B"], Float[jax.Array, "B"]]:
    """Whether each answer is given, and how much of each line is selected. A counts the answer's tokens; −1 after them."""
    asked_BA1 = jnp.maximum(answer_BA, 1)[..., None] - 1  # the query that gives a token is the one before it

    def selected_first(view: LayerView) -> jax.Array:
        selected = jnp.take_along_axis(view.selected, asked_BA1[:, :1], axis=1)
        if not selection.is_mask(selected):
            selected = selection.mask(selected, view.cache.capacity)
        return selected[:, 0]

    cache, step = whole_sequences(model.config, ids_BT, model.dtype)
    out = model.backbone(ids_BT, cache, step, observe=selected_first)
    given_BA = jnp.argmax(model.head(jnp.take_along_axis(out.hidden_BTD, asked_BA1, axis=1)), axis=-1)
    wanted_BA = jnp.take_along_axis(ids_BT, jnp.maximum(answer_BA, 0), axis=1)
    right_B = jnp.all((given_BA == wanted_BA) | (answer_BA < 0), axis=1)
    selected_BT = jnp.any(jnp.stack(out.observed), axis=0)
    return right_B, jnp.sum(selected_BT & line_BT, axis=1) / jnp.sum(line_BT, axis=1)


def _report(index_topk: int, trials: int, results: dict[int, Retrieved]) -> Report:
    rows = [("distance", "retrieved", "line's tokens selected")]
    rows += [
        (f"{distance:,}", f"{int(found.right.sum())}/{trials}", percent(float(found.selected.mean())))
        for distance, found in results.items()
    ]
    text = f"{trials} trials each; tokens attend to {index_topk:,} at most\n{table(rows)}"
    numbers = {
        "trials": trials,
        "index_topk": index_topk,
        "distances": [
            {"distance": d, "retrieved": int(f.right.sum()), "line_tokens_selected": float(f.selected.mean())}
            for d, f in results.items()
        ],
    }
    return Report(text, numbers)
