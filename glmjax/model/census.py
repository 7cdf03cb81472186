"""``python -m glmjax.model.census CONFIG``: how many parameters a model has, of which kind, and what they take.

Counted on the abstract model, of which nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from glmjax.model import assemble, names
from glmjax.model.config import Fp8Format, GlmConfig
from glmjax.model.transformer import Transformer

GROUPS = {
    "embed_VD": "embedding",
    "attention": "attention",
    "indexer": "indexer",
    "dense_gate_up_L2FD": "dense MLPs",
    "dense_down_LDF": "dense MLPs",
    "experts.gate_up_LE2FD": "routed experts",
    "experts.down_LEDF": "routed experts",
    "experts.shared_gate_up_L2FD": "shared experts",
    "experts.shared_down_LDF": "shared experts",
    "experts.router_LED": "routers",
    "experts.router_bias_LE": "routers",
    "input_norm_LD": "norms",
    "post_attention_norm_LD": "norms",
    "norm_D": "norms",
    "head_VD": "head",
}
"""Group of a weight, by its path in `Transformer` or the path's first part."""

MTP = "MTP layer"


def abstract(config: GlmConfig, *, mtp: bool, fp8: bool = False) -> Transformer:
    """A model of shapes and dtypes only, bf16 or FP8.

    Args:
        config: what to build; for FP8 without a format, the usual blocks of 128 × 128 are taken.
        mtp: with the MTP layer.
        fp8: keep as FP8 what an FP8 checkpoint has as FP8.
    """
    if fp8 and config.quantization is None:
        config = dataclasses.replace(config, quantization=Fp8Format())
    return assemble.abstract(config, jnp.bfloat16, mtp=mtp, fp8=fp8)


def census(config: GlmConfig) -> dict[str, int]:
    """Parameters by group.

    The norms of the latents and of the index keys count as attention and indexer. The MTP layer, which is the last entry
    of its stacks, is a group by itself with all it has: attention, indexer, experts and projection.

    Raises:
        KeyError: a weight that belongs to no group.
    """
    counts = dict.fromkeys([*GROUPS.values(), MTP], 0)
    for path, weight in assemble.named_weights(abstract(config, mtp=False)).items():
        counts[GROUPS.get(path) or GROUPS[path.split(".")[0]]] += weight.array.size
    if config.num_nextn_predict_layers:
        everything = sum(w.array.size for w in assemble.named_weights(abstract(config, mtp=True)).values())
        counts[MTP] = everything - sum(counts.values())
    return counts


def active(config: GlmConfig) -> int:
    """Parameters that take part in a token's forward.

    Of the routed experts the chosen ones; not the embedding, which is a look-up, and not the MTP layer, which drafts.
    """
    counts = census(config)
    idle = counts["routed experts"] * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    looked_up = 0 if config.tie_word_embeddings else counts["embedding"]
    return sum(counts.values()) - counts[MTP] - idle - looked_up


def stored_bytes(model: Transformer) -> int:
    """Bytes of all weights, scales included."""
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(nnx.state(model, nnx.Param)))


def table(config: GlmConfig) -> str:
    """What ``python -m glmjax.model.census`` prints."""
    counts, mtp = census(config), config.num_nextn_predict_layers > 0
    total = sum(counts.values())
    tensors = len({piece.tensor for piece in names.pieces(config, mtp=mtp)})
    rows = [(group, f"{count:,}", f"{count / total:.2%}") for group, count in counts.items() if count]
    rows += [("total without MTP", f"{total - counts[MTP]:,}", f"{(total - counts[MTP]) / 1e9:.2f}B")] if mtp else []
    rows += [("total", f"{total:,}", f"{total / 1e9:.2f}B")]
    rows += [("active per token", f"{active(config):,}", f"{active(config) / 1e9:.2f}B")]
    for label, fp8 in (("bytes in bf16", False), ("bytes in FP8, with scales", True)):
        size = stored_bytes(abstract(config, mtp=mtp, fp8=fp8))
        rows.append((label, f"{size:,}", f"{size / 2**30:.1f} GiB"))
    rows.append(("checkpoint tensors, bf16", f"{tensors:,}", ""))
    return "\n".join(f"{name:<26}{value:>20}{note:>12}".rstrip() for name, value, note in rows)


def main(config: tyro.conf.Positional[Path], /) -> None:
    """Count the parameters of a model.

    Args:
        config: a checkpoint's directory, or its config.json.
    """
    print(table(GlmConfig.from_dir(config)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m glmjax.model.census")
