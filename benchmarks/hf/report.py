"""What `benchmarks.compare_hf` found: whether the tokens agree, medians and ratios, the table and the JSON document."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.hf.client import Run
from benchmarks.measure import machine

MARGIN = 1e-4
"""Between logits in float32: closer ones may change places with the order of additions."""

QUIET = 0.2
"""Cores that others may keep busy before speeds, above all those of threads that wait for each other, mean little."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where the two sides' tokens part; after it they continue different texts and are not compared.

    Attributes:
        position: of the first new token that differs, from 0.
        margin: of Hugging Face's best two logits there.
    """

    position: int
    margin: float

    @property
    def tie(self) -> bool:
        """Whether rounding may choose either token."""
        return self.margin < MARGIN

    def __str__(self) -> str:
        verdict = "a tie" if self.tie else f"no tie, {MARGIN:.0e} or more"
        return f"tokens part at position {self.position}, the best two logits {self.margin:.1e} apart: {verdict}"


def first_divergence(ours: Run, theirs: Run) -> Divergence | None:
    """The first new token that differs, or None.

    Raises:
        ValueError: the sides made different numbers of tokens, or Hugging Face told no margins.
    """
    pairs = zip(ours.ids, theirs.ids, theirs.margins, strict=True)
    return next((Divergence(n, margin) for n, (mine, other, margin) in enumerate(pairs) if mine != other), None)


@dataclasses.dataclass(frozen=True)
class Context:
    """All runs with one prompt.

    Attributes:
        tokens: its length.
        flops: what reading it needs.
        ours: glmjax's runs.
        theirs: Hugging Face's, by turns with ours; fewer where they take minutes.
    """

    tokens: int
    flops: int
    ours: list[Run] = dataclasses.field(default_factory=list)
    theirs: list[Run] = dataclasses.field(default_factory=list)

    @property
    def divergences(self) -> list[Divergence]:
        """Of every pair of runs whose tokens part; those alike once."""
        found = (first_divergence(*pair) for pair in itertools.product(self.ours, self.theirs))
        return list(dict.fromkeys(divergence for divergence in found if divergence is not None))


@dataclasses.dataclass(frozen=True)
class Limits:
    """What decides how fast a model can be.

    Attributes:
        gemm: operations per second of the fastest float32 product.
        bandwidth: bytes read per second, median.
        weights: bytes of weights that decoding a token reads.
    """

    gemm: float
    bandwidth: float
    weights: int


def summary(context: Context, limits: Limits) -> dict[str, float]:
    """Medians of a context; ratios of speeds, above 1 where glmjax is faster; fractions of the limits."""
    prefill, hf_prefill = (median(run.first_token_seconds for run in runs) for runs in (context.ours, context.theirs))
    decode, hf_decode = (median(run.tokens_per_second for run in runs) for runs in (context.ours, context.theirs))
    return {
        "glmjax_prefill_seconds": prefill,
        "hf_prefill_seconds": hf_prefill,
        "prefill_ratio": hf_prefill / prefill,
        "glmjax_decode_tokens_per_second": decode,
        "hf_decode_tokens_per_second": hf_decode,
        "decode_ratio": decode / hf_decode,
        "prefill_flops_per_second": context.flops / prefill,
        "prefill_of_gemm": context.flops / prefill / limits.gemm,
        "decode_bytes_per_second": limits.weights * decode,
        "decode_of_bandwidth": limits.weights * decode / limits.bandwidth,
    }


def table(contexts: Sequence[Context], limits: Limits) -> str:
    """What is printed, the machine aside."""
    lines = [
        f"{'':>8}{'prefill, s':>20}{'':>9}{'decode, tokens/s':>20}{'':>9}{'glmjax prefill':>25}{'glmjax decode':>18}",
        f"{'context':>8}{'glmjax':>10}{'HF':>10}{'ratio':>9}{'glmjax':>10}{'HF':>10}{'ratio':>9}"
        f"{'GFLOP':>8}{'GFLOP/s':>9}{'of GEMM':>8}{'GB/s':>8}{'of read':>10}  tokens",
    ]
    for context in contexts:
        s = summary(context, limits)
        parted = min((divergence.position for divergence in context.divergences), default=None)
        lines.append(
            f"{context.tokens:>8,}{s['glmjax_prefill_seconds']:>10.3f}{s['hf_prefill_seconds']:>10.3f}"
            f"{s['prefill_ratio']:>8.2f}×{s['glmjax_decode_tokens_per_second']:>10.1f}"
            f"{s['hf_decode_tokens_per_second']:>10.1f}{s['decode_ratio']:>8.2f}×{context.flops / 1e9:>8.1f}"
            f"{s['prefill_flops_per_second'] / 1e9:>9.1f}{s['prefill_of_gemm']:>8.1%}"
            f"{s['decode_bytes_per_second'] / 1e9:>8.2f}{s['decode_of_bandwidth']:>10.1%}"
            f"  {'equal' if parted is None else f'equal up to {parted}'}"
        )
    lines += [f"context {c.tokens:,}: {divergence}" for c in contexts for divergence in c.divergences]
    runs = ", ".join(f"{len(context.ours)} and {len(context.theirs)}" for context in contexts)
    lines += [
        f"ratio: how many times as fast as HF glmjax is; runs by turns, of each context {runs} of HF; medians",
        f"the fastest product makes {limits.gemm / 1e9:.1f} GFLOP/s, memory reads {limits.bandwidth / 1e9:.2f} GB/s, "
        f"a token needs {limits.weights / 1e6:.1f} MB of weights",
    ]
    for side, of in (("glmjax", [c.ours for c in contexts]), ("HF", [c.theirs for c in contexts])):
        waiting, foreign = (
            max(getattr(run, field) for runs in of for run in runs) for field in ("waiting_cores", "foreign_cores")
        )
        lines.append(
            f"beside {side} at most {waiting:.2f} cores were busy with the waiting side, {foreign:.2f} with others"
            + (f": more than {QUIET}, repeat this on a quiet machine" if waiting + foreign > QUIET else "")
        )
    return "\n".join(lines)


def document(
    contexts: Sequence[Context], limits: Limits, greeting: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything, for a JSON file: every run with its tokens, what it was made of, where and when.

    Args:
        contexts: with their runs.
        limits: measured in between.
        greeting: what the worker said of itself.
        arguments: of the benchmark.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "hugging_face": {key: value for key, value in greeting.items() if key != "checkpoint"},
        "arguments": dict(arguments),
        "limits": dataclasses.asdict(limits),
        "contexts": [
            {
                **dataclasses.asdict(context),
                "summary": summary(context, limits),
                "divergences": [dataclasses.asdict(divergence) for divergence in context.divergences],
            }
            for context in contexts
        ],
    }
