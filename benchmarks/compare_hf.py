"""``python -m benchmarks.compare_hf``: glmjax beside Hugging Face transformers, on the CPU, in one run.

Both load the same float32 checkpoint of random weights and continue the same prompts greedily on the same cores, by turns:
while one runs, the other sleeps, and what neither of them did on these cores is told. Speeds stand beside what the machine gives in the same run: the fastest float32 product,
for prefill, and the read bandwidth, for decoding. Their tokens must be the same; where they part, Hugging Face's best two
logits must have been a tie (closer than 1e-4), else the exit status is 1.

The first time, an environment for Hugging Face is made in ``.hf/``, where the checkpoint is kept too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax
import numpy as np
import tyro

import glmjax
from benchmarks.hf.client import Run, Worker, WorkerError, environment
from benchmarks.hf.report import Context, Limits, document, table
from benchmarks.measure import (
    busy_seconds,
    cpu_seconds,
    gemm_speeds,
    machine,
    prefill_flops,
    read_bandwidths,
    weight_bytes,
)
from glmjax.glm import GLM
from glmjax.model.assemble import named_weights

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".hf"

LONG = 4096
"""Contexts above it are run `long_repeats` times only by Hugging Face."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time to first token and decoding speed of glmjax and Hugging Face transformers, with the same weights and prompts.

    Attributes:
        contexts: prompt lengths in tokens.
        new_tokens: tokens to generate after each; at least 3.
        repeats: runs of each, by turns; medians are printed.
        long_repeats: runs of Hugging Face with contexts above 4096, which take it minutes.
        threads: cores for each side.
        seed: of the prompts.
        gemm_size: side of the square matrices whose product measures the peak.
        read_mib: size of the array whose sum measures the read bandwidth.
        python: interpreter to make the environment of Hugging Face with.
        json: file to write everything to.
    """

    contexts: tuple[int, ...] = (512, 2048, 8192)
    new_tokens: int = 64
    repeats: int = 3
    long_repeats: int = 1
    threads: int = 2
    seed: int = 0
    gemm_size: int = 2048
    read_mib: int = 256
    python: str = "python3.11"
    json: Path | None = None


def run(glm: GLM, worker: Worker, arguments: Arguments) -> tuple[list[Context], Limits]:
    """Measure, the two sides by turns.

    Args:
        glm: the checkpoint that the worker has.
        worker: warm already; glmjax is warmed up here, which compiles for every length.
        arguments: what to run.
    """
    rng = np.random.default_rng(arguments.seed)
    prompts = [rng.integers(0, glm.config.vocab_size, tokens) for tokens in arguments.contexts]
    contexts = [Context(tokens, prefill_flops(glm.config, tokens)) for tokens in arguments.contexts]
    read, multiply = read_bandwidths(arguments.read_mib), gemm_speeds(arguments.gemm_size)

    def ours(prompt: np.ndarray) -> Run:
        new_tokens = arguments.new_tokens
        found = glm.generate(prompt, temperature=0, max_new_tokens=new_tokens, ignore_eos=True).finish()
        return Run(found.ids, found.statistics.first_token_seconds, found.statistics.tokens_per_second)

    def theirs(prompt: np.ndarray) -> Run:
        return worker.generate(prompt, arguments.new_tokens)

    for prompt in prompts:
        ours(prompt)
    bandwidths, speeds = [], []
    for repeat in range(max(arguments.repeats, arguments.long_repeats)):
        bandwidths.append(read())
        speeds.append(multiply())
        for context, prompt in zip(contexts, prompts, strict=True):
            theirs_repeats = arguments.long_repeats if context.tokens > LONG else arguments.repeats
            for name, runs, side, running, waiting, repeats in (
                ("HF", context.theirs, theirs, worker.pid, os.getpid(), theirs_repeats),
                ("glmjax", context.ours, ours, os.getpid(), worker.pid, arguments.repeats),
            ):
                if repeat < repeats:
                    runs.append(watched(side, prompt, running=running, waiting=waiting))
                    seconds = runs[-1].first_token_seconds
                    print(
                        f"context {context.tokens:,}, {name} run {repeat + 1}: prefill {seconds:.2f} s", file=sys.stderr
                    )
    return contexts, Limits(max(speeds), median(bandwidths), weight_bytes(glm.weights))


def watched(side: Callable[[np.ndarray], Run], prompt: np.ndarray, *, running: int, waiting: int) -> Run:
    """A side's run with the cores that others kept busy meanwhile.

    Args:
        side: continues a prompt.
        prompt: token ids.
        running: the process that does the work.
        waiting: the other side's.
    """

    def used() -> np.ndarray:
        return np.array([cpu_seconds(running), cpu_seconds(waiting), busy_seconds()])

    before, began = used(), time.perf_counter()
    found = side(prompt)
    ran, waited, everybody = ((used() - before) / (time.perf_counter() - began)).tolist()
    return dataclasses.replace(found, waiting_cores=waited, foreign_cores=max(everybody - ran - waited, 0.0))


def parameters(glm: GLM) -> int:
    """Numbers in a model's weights, the routers' biases included."""
    return sum(weight.array.size for weight in named_weights(glm.weights).values())


def main(arguments: Arguments) -> int:
    """Compare and print; 1 where tokens part without a tie, 2 where the comparison cannot be made."""
    try:
        if arguments.new_tokens < 3:
            raise ValueError(f"new_tokens {arguments.new_tokens} gives no decoding speed; ask for at least 3")
        if min(arguments.repeats, arguments.long_repeats) < 1:
            raise ValueError("repeats and long_repeats must be at least 1; leave a length out of contexts instead")
        python = environment(CACHE / "venv", arguments.python)
        jax.config.update("jax_platforms", "cpu")
        _keep_to(arguments.threads)
        script = ROOT / "benchmarks" / "hf" / "worker.py"
        options = ["--cache", str(CACHE), "--threads", str(arguments.threads)]
        with Worker([str(python), str(script), *options]) as worker:
            glm = glmjax.load(worker.greeting["checkpoint"], dtype="float32")
            held, theirs = parameters(glm), worker.greeting["parameters"]
            if held != theirs:
                raise ValueError(f"glmjax has {held:,} parameters of the checkpoint, Hugging Face {theirs:,}")
            contexts, limits = run(glm, worker, arguments)
            greeting = worker.greeting
    except (OSError, ValueError, WorkerError) as error:
        print(f"benchmarks.compare_hf: {error}", file=sys.stderr)
        return 2
    print(f"{held:,} parameters, float32, {arguments.new_tokens} new tokens, one sequence, {arguments.threads} threads")
    print(table(contexts, limits))
    print(machine())
    print(
        f"HF: transformers {greeting['transformers']} ({greeting['attention']} attention, {greeting['experts']} experts), "
        f"torch {greeting['torch']}, Python {greeting['python']}"
    )
    if arguments.json is not None:
        asked = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in ("json", "python")}
        found = document(contexts, limits, greeting, asked)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(not all(divergence.tie for context in contexts for divergence in context.divergences))


def _keep_to(cores: int) -> None:
    """Have this process and the worker to come use so many cores; XLA has as many threads as it finds cores."""
    if not hasattr(os, "sched_setaffinity"):
        raise OSError("cores can be shared out and watched on Linux only; run it there")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="python -m benchmarks.compare_hf")))
