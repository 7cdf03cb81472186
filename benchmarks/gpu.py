"""``python -m benchmarks.gpu``: two layers of GLM-5.1 at full width on one device, beside what the device can give.

Decode steps, prefill and the gather kernel with random weights and rows; the ceilings (reading, copying, a bf16 product)
are measured in the same run. Everything goes into one JSON file, written anew after every case, so that what was
measured outlives what fails. Bytes are the fewest that must be read, operations those that must be done: an
implementation that does more shows a lower share of the ceiling.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import tyro

from benchmarks.measure import prefill_flops, row_bytes, weight_bytes
from benchmarks.synthetic import random_cache, random_model
from glmjax.model.compile_checks import forward, glm_5_1_slice
from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.pallas import dispatch, gather
from glmjax.pallas.rows import Rows

RESULTS = Path(__file__).parent / "results" / "h200"


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        config: the model.
        lengths: rows that a decode step finds in a cache that holds the longest of them.
        prompts: tokens of a prefill, into a cache of twice the longest.
        array_mib: what the ceilings of memory read and copy.
        matrix: rows and columns of the ceiling's product.
        slots: rows that are gathered.
        pages: of 64 rows, from which they are.
        calls: of a decode step between two looks at the clock; a quarter of that of everything else.
    """

    config: GlmConfig
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    array_mib: int
    matrix: int
    slots: int
    pages: int
    calls: int


SIZES = {
    "glm-5.1": Size(glm_5_1_slice(), (2048, 32768), (512, 2048), 4096, 8192, 65536, 16384, 40),
    "tiny": Size(
        dataclasses.replace(
            glm_5_1_slice(),
            vocab_size=256,
            hidden_size=128,
            num_attention_heads=2,
            q_lora_rank=64,
            kv_lora_rank=48,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            intermediate_size=128,
            moe_intermediate_size=64,
            n_routed_experts=8,
            num_experts_per_tok=2,
            index_topk=16,
            index_n_heads=2,
            index_head_dim=32,
        ),
        (16, 48),
        (32,),
        1,
        64,
        64,
        2,
        4,
    ),
}
"""By name: the one for an H200, and one that exercises the same code anywhere."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Decode, prefill and gather on this device, beside its ceilings.

    Attributes:
        out: the JSON file; its folder is made. Default: named after today, in benchmarks/results/h200.
        size: what to measure.
        tests: a JUnit file of the tests that ran before, to be taken in; without it, they did not come to an end.
        repeats: looks at the clock; medians are kept.
        limit: seconds after which no further case begins.
    """

    out: Path | None = None
    size: Literal["glm-5.1", "tiny"] = "glm-5.1"
    tests: Path | None = None
    repeats: int = 5
    limit: float = 70.0


def seconds_per_call(step: Callable[[Any], Any], state: Any, calls: int, repeats: int) -> float:
    """Median over repeats of the time of one call, after a first one that is not counted.

    Args:
        step: its result is the next call's argument, so that a cache may be donated.
        state: the first call's.
        calls: between two looks at the clock: the device is never waited for in between.
        repeats: looks.
    """
    state = jax.block_until_ready(step(state))
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            state = step(state)
        jax.block_until_ready(state)
        found.append((time.perf_counter() - began) / calls)
    return median(found)


def ceilings(size: Size, repeats: int) -> dict[str, float]:
    """Bytes per second of a sum over a large array and of a copy (read and written), operations per second of a product."""
    calls = max(1, size.calls // 4)
    array = jnp.ones(size.array_mib << 18, jnp.float32)
    total = jax.jit(jnp.sum)
    reading = seconds_per_call(lambda _: total(array), None, calls, repeats)
    copying = seconds_per_call(jax.jit(lambda x: x + 1, donate_argnums=0), array, calls, repeats)
    del array
    a, b = (jax.random.normal(jax.random.key(n), (size.matrix, size.matrix), jnp.bfloat16) for n in range(2))
    product = jax.jit(jnp.matmul)
    multiplying = seconds_per_call(lambda _: product(a, b), None, calls, repeats)
    nbytes = size.array_mib << 20
    return {
        "read_bytes_per_second": nbytes / reading,
        "copy_bytes_per_second": 2 * nbytes / copying,
        "bf16_flops_per_second": 2 * size.matrix**3 / multiplying,
    }


@dataclasses.dataclass(frozen=True)
class Slice:
    """The model, made when first asked for, and its forward over one sequence, timed.

    Attributes:
        size: what to measure.
        repeats: looks at the clock.
    """

    size: Size
    repeats: int

    @cached_property
    def model(self) -> Transformer:
        """With random weights."""
        return random_model(self.size.config, jnp.bfloat16)

    def decode(self, ops: dispatch.Implementation) -> Iterator[dict[str, Any]]:
        """A step at every length, all with one program."""
        capacity = max(self.size.lengths)
        step, facts = self._compiled(ops, 1, capacity)
        for length in self.size.lengths:
            cost = {"bytes": self._bytes(1, length)}
            yield self._timed(step, length - 1, 1, capacity, self.size.calls) | cost | facts | {"length": length}

    def prefill(self, ops: dispatch.Implementation) -> Iterator[dict[str, Any]]:
        """Every prompt by itself, from its first token on."""
        capacity = 2 * max(self.size.prompts)
        for tokens in self.size.prompts:
            step, facts = self._compiled(ops, tokens, capacity)
            cost = {
                "bytes": self._bytes(tokens, tokens),
                "flops": prefill_flops(self.size.config, tokens),
            }
            yield self._timed(step, 0, tokens, capacity, max(1, self.size.calls // 4)) | cost | facts

    def _bytes(self, tokens: int, length: int) -> int:
        return weight_bytes(self.model, tokens) + row_bytes(self.size.config, length, jnp.bfloat16.dtype.itemsize)

    def _compiled(self, ops: dispatch.Implementation, tokens: int, capacity: int) -> tuple[Any, dict[str, Any]]:
        """The forward over arrays alone: modules would be taken apart and put together at every call."""
        weights, module = jax.tree.flatten(self.model)
        rows, cache_tree = jax.tree.flatten(random_cache(self.size.config, capacity, jnp.bfloat16))

        def step(weights: list[jax.Array], rows: list[jax.Array], ids_BT: jax.Array, positions_BT: jax.Array) -> Any:
            model, cache = jax.tree.unflatten(module, weights), jax.tree.unflatten(cache_tree, rows)
            logits_BTV, cache = forward(model, cache, ids_BT, positions_BT)
            return logits_BTV, jax.tree.leaves(cache)

        ids_BT = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        began = time.perf_counter()
        with dispatch.implementation(ops):
            compiled = jax.jit(step, donate_argnums=1).lower(weights, rows, ids_BT, ids_BT).compile()
        facts = {"compile_seconds": time.perf_counter() - began, "capacity": capacity}
        if memory := compiled.memory_analysis():
            facts["temporary_bytes"] = memory.temp_size_in_bytes
        return partial(compiled, weights), facts

    def _timed(self, forward: Any, first: int, tokens: int, capacity: int, calls: int) -> dict[str, Any]:
        ids_BT = jax.random.randint(jax.random.key(0), (1, tokens), 0, self.size.config.vocab_size, jnp.int32)
        positions_BT = jnp.arange(first, first + tokens, dtype=jnp.int32)[None]
        rows = jax.tree.leaves(random_cache(self.size.config, capacity, jnp.bfloat16))
        logits_BTV, rows = forward(rows, ids_BT, positions_BT)
        finite = bool(jnp.all(jnp.isfinite(logits_BTV)))
        step = lambda state: forward(state[1], ids_BT, positions_BT)  # noqa: E731
        seconds = seconds_per_call(step, (logits_BTV, rows), calls, self.repeats)
        return {"tokens": tokens, "seconds": seconds, "finite": finite}


def gathers(size: Size, repeats: int, ops: dispatch.Implementation) -> Iterator[dict[str, Any]]:
    """Latent rows at random slots, side by side; read and written."""
    shape = (2, size.pages, 64, size.config.cache_row_dim)
    rows = Rows(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))
    slot_K = jax.random.randint(jax.random.key(1), (size.slots,), 0, size.pages * 64, jnp.int32)
    call = gather.reference
    if ops == "mosaic":
        from glmjax.pallas import gather_mosaic

        call = gather_mosaic.mosaic
    run = jax.jit(call)
    equal = bool(jnp.array_equal(run(rows, 1, slot_K), gather.reference(rows, 1, slot_K)))
    seconds = seconds_per_call(lambda _: run(rows, 1, slot_K), None, max(1, size.calls // 4), repeats)
    yield {"tokens": size.slots, "seconds": seconds, "bytes": 2 * size.slots * rows.row_bytes, "equal": equal}


def with_shares(case: dict[str, Any], ceiling: dict[str, float]) -> dict[str, Any]:
    """A case with its rates, and what share of the ceilings they are in per cent."""
    rate, limit = case["bytes"] / case["seconds"], "copy" if case["kind"] == "gather" else "read"
    case |= {"bytes_per_second": rate, "percent_of_memory": 100 * rate / ceiling[f"{limit}_bytes_per_second"]}
    if "flops" in case:
        rate = case["flops"] / case["seconds"]
        case |= {"flops_per_second": rate, "percent_of_product": 100 * rate / ceiling["bf16_flops_per_second"]}
    return case


def tested(junit: Path) -> list[dict[str, Any]] | None:
    """Name, outcome, seconds, failure and recorded properties of every test in a JUnit file; None if there is no file."""
    if not junit.exists():
        return None
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        test = {"name": f"{case.get('classname')}.{case.get('name')}", "outcome": "passed", "seconds": case.get("time")}
        for part in case:
            if part.tag in ("failure", "error", "skipped"):
                test |= {"outcome": part.tag, "message": part.get("message", "")[:500]}
        found.append(test | {part.get("name"): part.get("value") for part in case.iter("property")})
    return found


def device() -> dict[str, Any]:
    """What the numbers depend on."""
    found = jax.devices()[0]
    return {
        "kind": found.device_kind,
        "platform": found.platform,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def line(case: dict[str, Any]) -> str:
    """A case for the terminal."""
    head = f"{case['kind']:<8}{case['ops']:<10}"
    if "seconds" not in case:
        return f"{head} {case.get('error') or case['skipped']}"
    text = f"{head}{case['tokens']:>7,} tokens{1e3 * case['seconds']:>11.3f} ms{case['bytes'] / 1e9:>9.3f} GB"
    text += f"{case['bytes_per_second'] / 1e9:>9.1f} GB/s ({case['percent_of_memory']:.1f} %)"
    if "flops" in case:
        text += f"{case['flops_per_second'] / 1e12:>8.2f} TFLOP/s ({case['percent_of_product']:.1f} %)"
    return text + (f"{case['length']:>8,} rows" if "length" in case else "")


def main(arguments: Arguments) -> int:
    """Measure, print and write; 1 if anything failed or is wrong."""
    began = time.monotonic()
    size, repeats = SIZES[arguments.size], arguments.repeats
    now = datetime.datetime.now(datetime.UTC)
    out = arguments.out or RESULTS / f"{now:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"when": now.isoformat(timespec="seconds"), "size": arguments.size, "device": device()}
    if arguments.tests:
        results["tests"] = tested(arguments.tests)
    results["ceilings"] = ceilings(size, repeats)
    for name, rate in results["ceilings"].items():
        print(f"{name:<22}{rate / 1e9:>12,.1f}e9", flush=True)
    results["cases"] = []

    def keep(case: dict[str, Any]) -> None:
        print(line(case), flush=True)
        results["cases"].append(case)
        results["seconds"] = time.monotonic() - began
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    model = Slice(size, repeats)
    kinds = {"decode": model.decode, "prefill": model.prefill, "gather": partial(gathers, size, repeats)}
    for ops, kind in itertools.product(dict.fromkeys(("reference", dispatch.current())), kinds):
        which = {"kind": kind, "ops": ops}
        cases = kinds[kind](ops)
        try:
            while time.monotonic() - began < arguments.limit:
                if (case := next(cases, None)) is None:
                    break
                keep(with_shares(which | case, results["ceilings"]))
            else:
                keep(which | {"skipped": f"what was left of it, after {arguments.limit:.0f} s"})
        except Exception as error:  # the other cases still have something to say
            traceback.print_exc()
            keep(which | {"error": f"{type(error).__name__}: {error}"[:500]})
    print(out)
    wrong = ("error" in c or c.get("finite") is False or c.get("equal") is False for c in results["cases"])
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, prog="python -m benchmarks.gpu")))
