"""``python -m glmjax.training RUN``: train the model in the box; resumes where RUN's last checkpoint was."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from glmjax.evaluation.probe import Probe
from glmjax.model.config import GlmConfig
from glmjax.model.tokenizer import Tokenizer
from glmjax.training import corpus
from glmjax.training.data import tokenize
from glmjax.training.recipe import Recipe, Stage
from glmjax.training.run import Run
from glmjax.training.tasks import Tasks


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a GLM-5-architecture model on the standard library of the running Python interpreter.

    Attributes:
        run: folder of the run: checkpoints, log, recipe.
        config: JSON file of the architecture.
        tokenizer: folder of tokenizer.json, from ``python -m glmjax.training.vocabulary``.
        until: stop at this step; the next call goes on from there.
        keep_every: steps between checkpoints.
        recipe: how to train.
    """

    run: tyro.conf.Positional[Path]
    config: Path = Path("configs/nano.json")
    tokenizer: Path = Path("glmjax/nano")
    until: int | None = None
    keep_every: int = 25
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


def main(arguments: Arguments) -> None:
    """Train, and say where it stands."""
    recipe, tokenizer = arguments.recipe, Tokenizer.from_dir(arguments.tokenizer)
    documents = corpus.load()
    tokens = tokenize(documents.training, tokenizer.raw)
    config = GlmConfig.from_dir(arguments.config)

    def tasks(stage: Stage) -> Tasks:
        return Tasks(tokenizer, stage.shares)

    probe = Probe(documents.held_out, tokenizer)
    run = Run(arguments.run, config, recipe, tokens, tasks=tasks, probe=probe, keep_every=arguments.keep_every)
    print(f"{len(tokens.ids):,} tokens of {len(tokens):,} documents; at step {run.step} of {recipe.steps}")
    run.train(arguments.until)
    print(f"at step {run.step} of {recipe.steps}; log in {arguments.run / 'log.jsonl'}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, args=sys.argv[1:]))
