"""``python -m benchmarks.serve_load``: a worker under load that does not wait for it, from little to more than it can do.

Requests arrive as a Poisson process, whatever has become of those before; their times are counted from when they were due.
Every answer is compared with what the same request got while nobody else was there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

import glmjax
from benchmarks.measure import machine
from benchmarks.serve.served import served
from benchmarks.serve.targets import Gateway, Seen, Target, Worker, watched
from benchmarks.serve.workload import Asked, arrivals, workload
from glmjax.evaluation.margins import margins
from glmjax.glm import GLM
from glmjax.model.sampling_params import SamplingParams
from glmjax.nano import NANO

TIE = 1e-4
"""Logits that are closer may come in any order: programs of different shapes round differently."""
_WATCHED_EVERY = 0.2


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times, goodput and the queue of a worker as load grows; what the gateway costs; and whether answers are right.

    Attributes:
        model_path: directory of a checkpoint; default the model in the box.
        requests: that there are; every answer is checked.
        loads: offered, as shares of what the worker can do.
        seconds: of each load.
        running: sequences that decode at once.
        queued: requests that may wait; more are refused.
        context: most tokens of a sequence.
        first: seconds until the first token that are good enough.
        between: seconds from token to token that are.
        pairs: requests that are sent both by the gateway and past it; 0 leaves it out.
        seed: of everything.
    """

    model_path: Path = NANO
    requests: int = 2000
    loads: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    seconds: float = 20.0
    running: int = 8
    queued: int = 1024
    context: int = 1024
    first: float = 2.0
    between: float = 0.1
    pairs: int = 100
    seed: int = 0


class Checked(NamedTuple):
    """Answers beside those of the same requests alone.

    Attributes:
        same: that are the same.
        ties: that part where rounding may have decided.
        wrong: that are others.
        lost: that did not come, by status; what is refused for a full queue is not lost.
    """

    same: int
    ties: int
    wrong: int
    lost: Counter[str]


async def open_loop(target: Target, asked: Sequence[Asked], rate: float, seed: int) -> list[Seen]:
    """Send requests when they are due, and wait for all of them."""
    begin, sent = time.monotonic(), []
    for one, seconds in zip(asked, arrivals(len(asked), rate, seed), strict=True):
        await asyncio.sleep(max(0.0, begin + seconds - time.monotonic()))
        sent.append(asyncio.create_task(target.ask(one, begin + seconds)))
    return await asyncio.gather(*sent)


async def closed_loop(target: Target, asked: Sequence[Asked], clients: int, label: str = "") -> list[Seen]:
    """Send requests, so many at a time, each when another one has ended; in their order."""
    left, seen = list(enumerate(asked))[::-1], [Seen(0.0)] * len(asked)
    bar = tqdm(total=len(asked), desc=label, disable=None)

    async def client() -> None:
        while left:
            n, one = left.pop()
            seen[n] = await target.ask(one, time.monotonic())
            bar.update()

    await asyncio.gather(*(client() for _ in range(clients)))
    bar.close()
    return seen


def check(asked: Sequence[Asked], seen: Sequence[Seen], alone: Sequence[Seen], model: Path) -> Checked:
    """Compare answers with those of the same requests alone.

    Args:
        asked: requests.
        seen: what came of them.
        alone: what came of each while nobody else was there.
        model: directory of the checkpoint, for margins where answers differ.
    """
    glm, same, ties, wrong, lost = None, 0, 0, 0, Counter()
    for one, found, expected in zip(asked, seen, alone, strict=True):
        if found.answer is None:
            lost[found.failure] += 1
        elif found.answer == expected.answer:
            same += 1
        elif isinstance(found.answer, str):
            wrong += 1
        else:
            glm = glm or glmjax.load(model)
            near = _tied(glm, one, found.answer, expected.answer)
            ties, wrong = ties + near, wrong + (not near)
    return Checked(same, ties, wrong, lost)


def _tied(glm: GLM, asked: Asked, found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether rounding may have decided where answers part."""
    at = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    params = SamplingParams(seed=asked.seed, max_new_tokens=asked.new_tokens, ignore_eos=True)
    return at is not None and margins(glm, glm.encode(asked.text), params, list(expected[:at])).least < TIE


async def run(arguments: Arguments, address: str, url: str) -> str:
    """Measure; the report."""
    worker, asked = Worker(address), workload(arguments.requests, seed=arguments.seed)
    alone = await closed_loop(worker, asked, 1, "alone")
    await worker.flush()
    begin = time.monotonic()
    some = asked[: max(4 * arguments.running, len(asked) // 8)]
    await closed_loop(worker, some, 2 * arguments.running, "together")
    can = len(some) / (time.monotonic() - begin)
    tokens = sum(one.new_tokens for one in asked) / len(asked)
    lines = [
        f"{len(asked)} requests, {sum(len(one.text) for one in asked) / len(asked):.0f} characters and {tokens:.0f} new "
        f"tokens on average; {arguments.running} run at once; together the worker answers {can:.1f} a second",
        "",
        f"{'load':>5}{'offered/s':>11}{'good/s':>8}{'TTFT ms':>10}{'P99':>8}{'ITL ms':>9}{'P99':>8}{'TPOT ms':>9}{'P99':>7}"
        f"{'E2E s':>8}{'P99':>8}{'running':>9}{'waiting':>9}{'refused':>9}",
    ]
    checked, at = Checked(0, 0, 0, Counter()), 0
    for n, load in enumerate(arguments.loads):
        await worker.flush()
        count = min(len(asked), max(8, round(load * can * arguments.seconds)))
        numbers = [(at + i) % len(asked) for i in range(count)]
        at += count
        mine = [asked[i] for i in numbers]
        seen, loads = await _observed(worker, mine, load * can, arguments.seed + n)
        lines.append(_row(arguments, load, load * can, seen, loads))
        checked = _sum(checked, check(mine, seen, [alone[i] for i in numbers], arguments.model_path))
    lines += ["", _verdict(checked)]
    if arguments.pairs and url:
        lines += ["", await _gateway(arguments, worker, Gateway(url, arguments.model_path.name), asked)]
    await worker.close()
    return "\n".join(lines)


async def _observed(
    worker: Worker, asked: Sequence[Asked], rate: float, seed: int
) -> tuple[list[Seen], list[tuple[int, int]]]:
    """A load, and who ran and waited while it came."""
    loads: list[tuple[int, int]] = []

    async def watch() -> None:
        async for load in watched(worker, _WATCHED_EVERY):
            loads.append(load)

    watching = asyncio.create_task(watch())
    seen = await open_loop(worker, asked, rate, seed)
    watching.cancel()
    return seen, loads


def _row(arguments: Arguments, load: float, rate: float, seen: Sequence[Seen], loads: Sequence[tuple[int, int]]) -> str:
    answered = [one for one in seen if one.answer is not None]
    streamed = [one for one in answered if len(one.times) > 1]
    good = sum(one.first <= arguments.first and one.between <= arguments.between for one in answered)
    seconds = max(one.times[-1] for one in answered) - min(one.due for one in seen)

    def both(values: Sequence[float], scale: float, width: tuple[int, int], digits: int = 0) -> str:
        middle, last = np.percentile(values, (50, 99)) * scale
        return f"{middle:>{width[0]}.{digits}f}{last:>{width[1]}.{digits}f}"

    return (
        f"{load:>5.2f}{rate:>11.1f}{good / seconds:>8.1f}"
        + both([one.first for one in streamed], 1e3, (10, 8))
        + both([gap for one in streamed for gap in one.gaps], 1e3, (9, 8))
        + both([one.between for one in streamed], 1e3, (9, 7), 1)
        + both([one.whole for one in answered], 1, (8, 8), 2)
        + f"{np.mean([running for running, _ in loads]):>9.1f}{max(waiting for _, waiting in loads):>9}"
        + f"{sum(one.failure == 'RESOURCE_EXHAUSTED' for one in seen):>9}"
    )


def _sum(a: Checked, b: Checked) -> Checked:
    return Checked(a.same + b.same, a.ties + b.ties, a.wrong + b.wrong, a.lost + b.lost)


def _verdict(checked: Checked) -> str:
    lost = sum(count for status, count in checked.lost.items() if status != "RESOURCE_EXHAUSTED")
    refused = checked.lost["RESOURCE_EXHAUSTED"]
    return (
        f"answers: {checked.same} as alone, {checked.ties} ties, {checked.wrong} wrong or crossed, {lost} lost, "
        f"{refused} refused"
    )


async def _gateway(arguments: Arguments, worker: Worker, gateway: Gateway, asked: Sequence[Asked]) -> str:
    """One request after another, by turns past the gateway and through it; both have it in the cache."""
    some = [one._replace(stream=True) for one in asked[: arguments.pairs]]
    await closed_loop(worker, some, 1)
    seen: dict[Target, list[Seen]] = {worker: [], gateway: []}
    for n, one in enumerate(some):
        for target in (worker, gateway) if n % 2 else (gateway, worker):
            seen[target].append(await target.ask(one, time.monotonic()))
    first, whole = (
        [getattr(b, name) - getattr(a, name) for a, b in zip(seen[worker], seen[gateway], strict=True)]
        for name in ("first", "whole")
    )
    failed = sum(one.answer is None for one in seen[gateway])
    await gateway.close()
    return (
        f"gateway: {median(first) * 1e3:.1f} ms to the first token (past it {_middle(seen[worker], 'first')}), "
        f"{median(whole) * 1e3:.1f} ms to the last (past it {_middle(seen[worker], 'whole')}), OpenAI's package included; "
        f"{failed} of {len(some)} failed"
    )


def _middle(seen: Sequence[Seen], name: str) -> str:
    return f"{median(getattr(one, name) for one in seen) * 1e3:.1f} ms"


def main(arguments: Arguments) -> None:
    """Start a worker, measure, print."""
    flags = [
        *("--model-path", str(arguments.model_path), "--context-length", str(arguments.context)),
        *("--max-running-requests", str(arguments.running), "--log-level", "warning", "--chunked-prefill-size", "256"),
        *("--max-queued-requests", str(arguments.queued)),
    ]
    with served(flags, gateway=bool(arguments.pairs)) as running:
        print(f"ready after {running.began:.1f} s")
        print(asyncio.run(run(arguments, running.address, running.url)))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.serve_load"))
