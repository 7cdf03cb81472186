"""``python -m glmjax.training.plot RUN FILE``: a run's log as curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

_SMOOTHED = 15  # lines of the log that a point of a curve is the median of


def main(run: tyro.conf.Positional[Path], file: tyro.conf.Positional[Path] = Path("docs/training.svg")) -> None:
    """Draw loss, bits per byte, load of the experts and what the indexer finds.

    Args:
        run: folder of the run.
        file: where to write the drawing; its ending says in what format.
    """
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    draw(lines, file)
    print(f"{len(lines)} lines of {run / 'log.jsonl'} in {file}")


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Four panels over the steps.

    Args:
        lines: of a run's log.
        file: where to write.
    """
    from matplotlib.figure import Figure  # the drawing library is not needed to train

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    loss, bits, load, indexer = figure.subplots(2, 2, sharex=True).flat
    steps = np.array([line["step"] for line in lines])
    _curve(loss, steps, [line["next_token"] for line in lines], "next token")
    for k in range(max(len(line["mtp"]) for line in lines)):
        drafting = [line for line in lines if k < len(line["mtp"])]
        _curve(loss, steps[-len(drafting) :], [line["mtp"][k] for line in drafting], f"MTP, application {k + 1}")
    loss.set(ylabel="nats per token")
    probed = [line for line in lines if "held_out_bits_per_byte" in line]
    held_out = [line["held_out_bits_per_byte"] for line in probed]
    bits.plot([line["step"] for line in probed], held_out, marker=".", label="held-out modules")
    bits.set(ylabel="bits per byte")
    _curve(load, steps, [line["busiest_expert"] for line in lines], "busiest of all layers")
    _curve(load, steps, [line["idlest_expert"] for line in lines], "idlest")
    load.set(ylabel="load over equal share", xlabel="step", ylim=(0, None))
    _curve(indexer, steps, [line["indexer_recall"] for line in lines], "attention's mass on what is selected")
    _curve(indexer, steps, [line["indexer_kl"] for line in lines], "KL from attention, nats")
    indexer.set(xlabel="step", ylim=(0, 1))
    for panel in (loss, bits, load, indexer):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def _curve(panel: Any, steps: np.ndarray, values: Sequence[float], label: str) -> None:
    """A running median, since a batch is few documents."""
    padded = np.pad(np.asarray(values, float), _SMOOTHED // 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _SMOOTHED)
    panel.plot(steps, np.median(windows, axis=1), label=label)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m glmjax.training.plot")
