"""What a machine can give and what a model asks of it: the two sides of the fractions that benchmarks report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.model.assemble import named_weights
from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer


def weight_bytes(model: Transformer, tokens: int = 1) -> int:
    """Fewest bytes of weights that a forward reads.

    Of the embedding the tokens' rows; of the routed experts those that somebody chooses, where every choice is as likely
    as another; of the MTP layer (the last entry of its stacks) nothing.

    Args:
        model: the weights, or their shapes.
        tokens: of the forward.
    """
    config, total = model.config, 0.0
    chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    shares = {"experts.gate_up_LE2FD": chosen, "experts.down_LEDF": chosen}
    if not config.tie_word_embeddings:
        shares["embed_VD"] = min(1.0, tokens / config.vocab_size)
    for name, weight in named_weights(model).items():
        if name.startswith("mtp."):
            continue
        size = sum(array.size * array.dtype.itemsize for array in (weight.array, weight.scales) if array is not None)
        if model.mtp is not None and weight.letters.startswith("L") and not name.startswith("dense_"):
            size *= 1 - 1 / weight.array.shape[0]
        total += size * shares.get(name, 1.0)
    return round(total)


def row_bytes(config: GlmConfig, length: int, itemsize: int) -> int:
    """Fewest bytes of cached rows that a forward reads: all index keys, and the latents that one token selects.

    Args:
        config: the model.
        length: rows in the cache, the tokens' own among them.
        itemsize: bytes of a stored number.
    """
    keys = config.indexer_types.count("full") * length * config.index_head_dim
    latents = config.num_hidden_layers * min(length, config.index_topk) * config.cache_row_dim
    return itemsize * (keys + latents)


def prefill_flops(config: GlmConfig, tokens: int) -> int:
    """Floating-point operations that reading a prompt of T tokens needs, two per multiplication and addition.

    In the letters of docs/architecture.md, multiplications

    - of every layer, per token: D·Q + Q·N·Y + D·C + N·H·R + N·R·O + N·O·D, the projections of absorbed attention;
    - of every layer, per pair of a token and a position that it attends to: N·(C + R). Of its t + 1 visible positions,
      token t attends to min(t + 1, K);
    - of a layer with an indexer, per token: Q·I·J + D·J + D·I, its projections;
      and per pair of a token and any visible position, T·(T + 1) / 2 of them: I·(J + 1), the scores;
    - of a dense layer, per token: 3·D·F;
    - of a sparse layer, per token: D·E, the router, and 3·D·F for each of the X chosen experts and the shared ones;
    - once: D·V, the head, for the last token only.

    Norms, rope, softmax and the choices themselves are not counted, nor is what an implementation does beyond need, such
    as scores of masked positions.
    """
    D, N, Q, R = config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    C, H, Y, O = config.cache_row_dim, config.qk_nope_head_dim, config.qk_head_dim, config.v_head_dim  # noqa: E741
    I, J, K = config.index_n_heads, config.index_head_dim, config.index_topk  # noqa: E741
    short = min(tokens, K)
    attended = short * (short + 1) // 2 + (tokens - short) * K
    visible = tokens * (tokens + 1) // 2

    attention = tokens * (D * Q + Q * N * Y + D * C + N * H * R + N * R * O + N * O * D) + attended * N * (C + R)
    indexer = tokens * (Q * I * J + D * J + D * I) + visible * I * (J + 1)
    dense = tokens * 3 * D * config.intermediate_size
    chosen = config.num_experts_per_tok + config.n_shared_experts
    sparse = tokens * (D * config.n_routed_experts + 3 * D * config.moe_intermediate_size * chosen)
    multiplications = D * config.vocab_size
    for mlp, index in config.layers:
        multiplications += attention + (indexer if index == "full" else 0) + (dense if mlp == "dense" else sparse)
    return 2 * multiplications


def read_bandwidths(mib: int) -> Callable[[], float]:
    """A function that measures NumPy's and JAX's bytes per second over a sum of `mib` MiB, warmed up; the faster's."""
    host = np.ones(mib * 2**18, np.float32)
    device = jnp.ones(mib * 2**18, jnp.float32)
    total = jax.jit(jnp.sum)

    def measure() -> float:
        found = []
        for add, array in ((np.sum, host), (total, device)):
            began = time.perf_counter()
            float(add(array))
            found.append(array.nbytes / (time.perf_counter() - began))
        return max(found)

    measure()
    return measure


def gemm_speeds(size: int, attempts: int = 5) -> Callable[[], float]:
    """A function that measures JAX's operations per second in a float32 product of `size`³, warmed up; best of several."""
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(jnp.matmul)

    def measure() -> float:
        found = []
        for _ in range(attempts):
            began = time.perf_counter()
            product(square, square).block_until_ready()
            found.append(2 * size**3 / (time.perf_counter() - began))
        return max(found)

    measure()
    return measure


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used, all its threads together (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # its name may hold anything
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """CPU time since the start of the system that somebody had of the cores this process may use (Linux)."""
    busy, cores = 0, {f"cpu{core}" for core in os.sched_getaffinity(0)}
    for name, *ticks in map(str.split, Path("/proc/stat").read_text().splitlines()):
        if name in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            busy += user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """What the numbers depend on."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = ", ".join(f"{name} {version(name)}" for name in ("glmjax", "jax", "jaxlib", "flax", "numpy"))
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{device.device_kind} ({cpu}, {os.cpu_count()} cores{load}); Python {platform.python_version()}, {versions}"
