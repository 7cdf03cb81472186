"""``python -m benchmarks.load_memory``: the peak of anonymous memory while a checkpoint is loaded.

A synthetic checkpoint of GLM shape is written to a temporary directory and loaded in a fresh process, whose anonymous
memory (RssAnon of ``/proc``; pages of mapped files are not counted, the kernel can drop them) is sampled from outside.
What it grew by, relative to the bytes of the weights, must stay within 1.2; else the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tyro

Format = Literal["bf16", "fp8", "orbax"]

LIMIT = 1.2
ROOT = Path(__file__).parents[1]

RAW: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "intermediate_size": 3072,
    "moe_intermediate_size": 256,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "index_topk": 2048,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "attention_bias": False,
    "dtype": "bfloat16",
}
"""GLM-5 made narrow: 64 experts a layer; more layers make it larger."""

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor to be written: its name, safetensors' name of its dtype, its shape and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What a child process measured, in bytes and seconds."""

    weights: int
    peak: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.peak / self.weights


def stored(config: Any, *, fp8: bool) -> Iterator[Stored]:
    """Every tensor of the checkpoint, in the order of its layers; with scales after the FP8 ones."""
    import jax.numpy as jnp

    from glmjax.model.assemble import abstract, named_weights
    from glmjax.model.names import pieces

    mtp = config.num_nextn_predict_layers > 0
    weights = named_weights(abstract(config, jnp.bfloat16, mtp=mtp, fp8=fp8))
    seen: set[str] = set()
    for piece in pieces(config, mtp=mtp):
        if piece.tensor in seen:  # the other half of kv_b
            continue
        seen.add(piece.tensor)
        weight = weights[piece.weight]
        shape = weight.array.shape[len(piece.index) :]
        if weight.columns:
            split = len(shape) - weight.columns
            rows = shape[0] * piece.head_rows if piece.row_range else math.prod(shape[:split])
            shape = (rows, math.prod(shape[split:]))
        size = math.prod(shape)
        if weight.scale is not None:
            yield Stored(piece.tensor, "F8_E4M3", shape, size)
            blocks = tuple(-(-n // 128) for n in shape)
            yield Stored(piece.tensor + "_scale_inv", "F32", blocks, 4 * math.prod(blocks))
        elif weight.array.dtype == jnp.float32:
            yield Stored(piece.tensor, "F32", shape, 4 * size)
        else:
            yield Stored(piece.tensor, "BF16", shape, 2 * size)


def write(directory: Path, gib: float, *, fp8: bool) -> int:
    """Write a checkpoint of at least `gib` GiB in shards of at most half a GiB; the bytes of its tensors.

    Numbers repeat every 16 MiB: that is all that is ever held.
    """
    from glmjax.model.config import GlmConfig

    raw = RAW | ({"quantization_config": QUANTIZATION} if fp8 else {})
    plan = list(stored(GlmConfig.from_dict(raw), fp8=fp8))
    while (total := sum(tensor.nbytes for tensor in plan)) < gib * 2**30:
        raw = raw | {"num_hidden_layers": raw["num_hidden_layers"] + 1}
        plan = list(stored(GlmConfig.from_dict(raw), fp8=fp8))
    free = shutil.disk_usage(directory).free
    if free < 1.1 * total + 2**30:
        sys.exit(f"{directory} has {free / 2**30:.1f} GiB free, {total / 2**30:.1f} are to be written; set TMPDIR")
    files: list[list[Stored]] = [[]]
    for tensor in plan:
        if sum(t.nbytes for t in files[-1]) + tensor.nbytes > 2**29:
            files.append([])
        files[-1].append(tensor)
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(2**23, np.float32)
    noise = {
        "BF16": (0.02 * normal).astype(ml_dtypes.bfloat16).tobytes(),
        "F8_E4M3": np.tile((32 * normal).astype(ml_dtypes.float8_e4m3fn), 2).tobytes(),
        "F32": (np.abs(normal[: 2**22]) * 1e-3).tobytes(),
    }
    where = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        where |= {tensor.name: name for tensor in tensors}
        header, offset = {}, 0
        for tensor in tensors:
            end = offset + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                for begin in range(0, tensor.nbytes, 2**24):
                    file.write(noise[tensor.dtype][: min(2**24, tensor.nbytes - begin)])
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(raw))
    return total


def anonymous(pid: int | str = "self") -> int:
    """A process's resident anonymous memory in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/{pid}/status has no RssAnon; Linux 4.5 or newer is needed")


def child(directory: str) -> None:
    """In the fresh process: say when the interpreter is up, load, say how much and how long."""
    import jax
    import jax.numpy as jnp

    from glmjax.model import checkpoint
    from glmjax.model.census import stored_bytes

    jax.block_until_ready(jnp.ones(8) + 1)
    print(anonymous(), flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    model = checkpoint.load(directory, dtype=jnp.bfloat16)
    jax.block_until_ready(jax.tree.leaves(model))
    print(json.dumps({"seconds": time.perf_counter() - began, "weights": stored_bytes(model)}), flush=True)


def measure(directory: Path) -> Result:
    """Load in a fresh process and watch it from here, which its locks cannot delay."""
    command = [sys.executable, "-c", f"from benchmarks.load_memory import child; child({str(directory)!r})"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        baseline, peak, done = int(process.stdout.readline()), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.003):
                peak = max(peak, anonymous(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
        done.set()
        watcher.join()
    if process.returncode or not line:
        sys.exit(f"loading {directory} failed with status {process.returncode}")
    told = json.loads(line)
    return Result(told["weights"], peak - baseline, told["seconds"])


def main(gib: float = 4.0, formats: tuple[Format, ...] = ("bf16",)) -> None:
    """Measure the peak of memory while a checkpoint is loaded.

    Args:
        gib: least size of the synthetic checkpoint.
        formats: bf16 and fp8 (kept) from safetensors, orbax from a converted bf16 checkpoint.
    """
    results: dict[Format, Result] = {}
    for form in formats:
        with tempfile.TemporaryDirectory(prefix="glmjax-load-") as name:
            directory = Path(name) / "published"
            directory.mkdir()
            write(directory, gib, fp8=form == "fp8")
            if form == "orbax":
                converted = Path(name) / "converted"
                command = [sys.executable, "-m", "glmjax.model.checkpoint", "convert", str(directory), str(converted)]
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                shutil.rmtree(directory)
                directory = converted
            results[form] = measure(directory)
    print(f"{'format':<8}{'weights GiB':>13}{'peak GiB':>11}{'ratio':>8}{'limit':>8}{'seconds':>10}{'GB/s':>8}")
    for form, r in results.items():
        sizes = f"{form:<8}{r.weights / 2**30:>13.3f}{r.peak / 2**30:>11.3f}{r.ratio:>8.3f}{LIMIT:>8.1f}"
        print(f"{sizes}{r.seconds:>10.2f}{r.weights / r.seconds / 1e9:>8.2f}")
    sys.exit(any(r.ratio > LIMIT for r in results.values()))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.load_memory")
