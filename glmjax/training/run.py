"""A training run: stages of steps, checkpoints from which it goes on exactly, a log, and the exported model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source
from glmjax.training.data import Rewrite, Tokens, as_it_is, training_batches
from glmjax.training.losses import Batch, Losses
from glmjax.training.recipe import Recipe, Stage, TrainState, start, train_step


class Run:
    """One run in one folder; constructed again over the same folder it resumes where the last checkpoint was.

    Args:
        folder: for checkpoints and ``log.jsonl``, one line of losses per `log_every` steps.
        config: the model to train.
        recipe: how; a folder's recipe must not change between sessions.
        tokens: the corpus.
        tasks: what some rows of a stage are turned into; see `glmjax.training.tasks`.
        probe: measures the model now and then; what it returns goes into the log.
        keep_every: steps between checkpoints.
        probe_every: steps between measurements.
        log_every: steps between lines of the log.
    """

    def __init__(
        self,
        folder: Path,
        config: GlmConfig,
        recipe: Recipe,
        tokens: Tokens,
        *,
        tasks: Callable[[Stage], Rewrite] = lambda _: as_it_is,
        probe: Callable[[Transformer], dict[str, float]] | None = None,
        keep_every: int = 50,
        probe_every: int = 100,
        log_every: int = 10,
    ):
        self.folder, self.recipe, self.tokens, self.tasks = folder, recipe, tokens, tasks
        self.probe, self.probe_every = probe, probe_every
        self.keep_every, self.log_every = keep_every, log_every
        folder.mkdir(parents=True, exist_ok=True)
        self._settle_recipe(config)
        self._checkpoints = _checkpoints(folder)
        self.state = start(Transformer(config, dtype=jnp.float32, rngs=random_source(recipe.seed)), recipe)
        self._batches_state: Any = None
        if (latest := self._checkpoints.latest_step()) is not None:
            self.state, self._batches_state = _restore(self._checkpoints, latest, self.state)

    @staticmethod
    def resume(folder: Path, config: GlmConfig) -> TrainState:
        """The state of a run's last checkpoint, whatever its recipe.

        Raises:
            FileNotFoundError: the run has none.
        """
        checkpoints = _checkpoints(folder)
        if (latest := checkpoints.latest_step()) is None:
            raise FileNotFoundError(f"no checkpoint in {folder / 'checkpoints'}; train first")
        state = start(Transformer(config, dtype=jnp.float32, rngs=random_source(0)), Recipe())
        return _restore(checkpoints, latest, state)[0]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state.step)

    def train(self, until: int | None = None) -> TrainState:
        """Go on to step `until`, default the recipe's end; a checkpoint is kept there and every `keep_every` steps."""
        until = self.recipe.steps if until is None else min(until, self.recipe.steps)
        advance = jax.jit(train_step, static_argnames=("recipe", "stage"), donate_argnums=0)
        with tqdm(total=self.recipe.steps, initial=self.step, unit="step", disable=None) as bar:
            for stage, batches, end in self._stages():
                began, seen = time.perf_counter(), 0
                while (step := self.step) < min(end, until):
                    batch = Batch(**{name: jnp.asarray(array) for name, array in next(batches).items()})
                    seen += batch.ids_BT.size
                    self.state, out, norm = advance(self.state, batch, recipe=self.recipe, stage=stage)
                    if (step + 1) % self.log_every == 0 or step + 1 == until:
                        jax.block_until_ready(self.state)
                        self._log(step + 1, out, norm, seen / (time.perf_counter() - began))
                        began, seen = time.perf_counter(), 0
                        bar.set_postfix(loss=f"{float(out.next_token):.3f}")
                    bar.update()
                    self._batches_state = batches.get_state()
                    if (step + 1) % self.keep_every == 0 or step + 1 in (end, until):
                        self._save()
        return self.state

    def _stages(self) -> Iterator[tuple[Stage, Any, int]]:
        """Each stage, its batches, those done skipped, and the step at which it ends. Every stage has its own order."""
        begin = 0
        for number, stage in enumerate(self.recipe.stages):
            end = begin + stage.steps
            if self.step < end:
                seed = self.recipe.seed + 1000 * number
                shape = {"batch_size": stage.batch_size, "seq_len": stage.seq_len}
                batches = iter(training_batches(self.tokens, **shape, seed=seed, rewrite=self.tasks(stage)))
                if self.step > begin:
                    batches.set_state(self._batches_state)
                yield stage, batches, end
            begin = end

    def _save(self) -> None:
        leaves = jax.tree.leaves(self.state)
        items = {"state": ocp.args.StandardSave(leaves), "data": ocp.args.JsonSave(self._batches_state)}
        self._checkpoints.save(self.step, args=ocp.args.Composite(**items))

    def _settle_recipe(self, config: GlmConfig) -> None:
        """Write the recipe of a new folder; refuse an old one that was begun with another."""
        said = {"recipe": repr(self.recipe), "config": repr(config)}
        file = self.folder / "recipe.json"
        if file.exists() and (found := json.loads(file.read_text())) != said:
            changed = [key for key in said if found.get(key) != said[key]]
            raise ValueError(
                f"{self.folder} was begun with another {' and '.join(changed)}; go on with that one, or use a new folder"
            )
        file.write_text(json.dumps(said, indent=1))

    def _log(self, step: int, out: Losses, norm: jax.Array, tokens_per_second: float) -> None:
        load_LE = np.asarray(out.load_LE)
        line = {
            "step": step,
            "next_token": round(float(out.next_token), 4),
            "mtp": [round(float(loss), 4) for loss in out.mtp_K],
            "indexer_kl": round(float(out.indexer), 5),
            "indexer_recall": round(float(out.recall), 4),
            "grad_norm": round(float(norm), 4),
            "busiest_expert": round(float(load_LE.max()) * load_LE.shape[1], 3),
            "idlest_expert": round(float(load_LE.min()) * load_LE.shape[1], 3),
            "tokens_per_second": round(tokens_per_second, 1),
        }
        if self.probe and (step % self.probe_every == 0 or step == self.recipe.steps):
            line |= self.probe(self.state.model)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def _checkpoints(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _restore(checkpoints: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, Any]:
    """The state and the position in the data of a checkpoint."""
    leaves, tree = jax.tree.flatten(like)
    abstract = [ocp.utils.to_shape_dtype_struct(leaf) for leaf in leaves]
    items = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
    kept = checkpoints.restore(step, args=ocp.args.Composite(**items))
    return jax.tree.unflatten(tree, kept["state"]), kept["data"]
