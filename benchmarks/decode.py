"""``python -m benchmarks.decode``: what a token costs as the context grows, beside what the memory could give.

One sequence. A token reads the weights it uses and, of the cache, all index keys and the latents it selects. The program
is the one behind `generate`; weights and cached rows are random, so that no long prompt has to be read first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.measure import machine, read_bandwidths, row_bytes, weight_bytes
from benchmarks.synthetic import random_cache, random_model
from glmjax.decoding import decode
from glmjax.model.config import GlmConfig
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.model.transformer import Transformer

CONFIGURATION = Path(__file__).parents[1] / "configs" / "small.json"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Decode steps at several contexts.

    Attributes:
        config: a config.json.
        dtype: of weights, activations and cached rows.
        contexts: rows in the cache with the last token's own, all of them visible to it.
        steps: tokens of a dispatch, the last ones of the context; up to 32.
        repeats: dispatches of each context, by turns.
        read_mib: size of the array whose sum measures the read bandwidth.
    """

    config: Path = CONFIGURATION
    dtype: str = "float32"
    contexts: tuple[int, ...] = (2048, 8192, 32768)
    steps: int = 16
    repeats: int = 15
    read_mib: int = 256


def stepper(model: Transformer, context: int, steps: int) -> Callable[[], float]:
    """A function that runs the last steps of a context, greedily, and gives the seconds of one; warmed up."""
    config = model.config
    cache = random_cache(config, context, model.dtype)
    state = SamplingState.from_params([SamplingParams(temperature=0)], [()], config.vocab_size)
    token, position = np.int32([0]), np.int32([context - steps])
    nowhere = np.full(1, -1, np.int32)

    def measure() -> float:
        nonlocal cache, state
        began = time.perf_counter()
        run, state, cache = decode(model, cache, state, token, position, np.int32(steps), nowhere, None)
        run.token_ZB.block_until_ready()
        return (time.perf_counter() - began) / steps

    measure()
    return measure


def run(config: GlmConfig, arguments: Arguments) -> str:
    """Measure; the table.

    Raises:
        ValueError: a context is longer than the model's, or shorter than the steps.
    """
    shortest, longest = min(arguments.contexts), max(arguments.contexts)
    if shortest < arguments.steps or longest > config.max_position_embeddings:
        raise ValueError(
            f"contexts {arguments.contexts} must be from {arguments.steps} (steps) to {config.max_position_embeddings} "
            "(max_position_embeddings) tokens; leave out those that are not"
        )
    model = random_model(config, jnp.dtype(arguments.dtype))
    steppers = [stepper(model, context, arguments.steps) for context in arguments.contexts]
    read = read_bandwidths(arguments.read_mib)
    rounds = [(read(), *(step() for step in steppers)) for _ in range(arguments.repeats)]
    bandwidth, *_ = map(median, zip(*rounds, strict=True))
    weights = weight_bytes(model)
    lines = [
        f"{'context':>8}{'step':>9}{'of first':>10}{'decode':>10}{'weights':>10}{'cache':>10}{'weights':>10}{'of memory':>11}",
        f"{'tokens':>8}{'ms':>9}{'times':>10}{'tokens/s':>10}{'MB/token':>10}{'MB/token':>10}{'GB/s':>10}{'%':>11}",
    ]
    for n, context in enumerate(arguments.contexts, 1):
        seconds = median(times[n] for times in rounds)
        ratio = median(times[n] / times[1] for times in rounds)
        rows = row_bytes(config, context, model.dtype.itemsize)
        lines.append(
            f"{context:>8,}{1e3 * seconds:>9.2f}{ratio:>10.2f}{1 / seconds:>10.1f}{weights / 1e6:>10.2f}{rows / 1e6:>10.2f}"
            f"{weights / seconds / 1e9:>10.2f}{100 * weights / seconds / bandwidth:>11.1f}"
        )
    lines.append(
        f"memory reads {bandwidth / 1e9:.2f} GB/s; medians of {arguments.repeats} rounds, ratios within a round"
    )
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    """Print the table."""
    print(f"{arguments.config.name} with random weights, {arguments.dtype}, one sequence")
    print(run(GlmConfig.from_dir(arguments.config), arguments))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.decode"))
