"""Which tensor of a published checkpoint fills which part of which weight (model-spec: Checkpoint names)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from glmjax.model.config import GlmConfig
from glmjax.model.pattern import LayerIndex, layer_indices, mtp_index


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor and the part of a weight it fills.

    Attributes:
        weight: path of the weight in `Transformer`, e.g. ``attention.q_a_LQD``.
        index: leading indices of the part, e.g. (layer, expert, 0); () for a whole weight.
        tensor: name in the checkpoint; its scales are ``<name>_scale_inv``.
        row_range: where each head's rows of this part begin and end among the tensor's rows of that head, or None where
            the part takes all rows.
        head_rows: rows the tensor has per head, where row_range is given.
    """

    weight: str
    index: tuple[int, ...]
    tensor: str
    row_range: tuple[int, int] | None = None
    head_rows: int = 0


def pieces(config: GlmConfig, *, mtp: bool) -> Iterator[Piece]:
    """Every tensor of a model's checkpoint; kv_b comes twice, for its key and its value half.

    Args:
        config: the model's.
        mtp: with the MTP layer's.
    """
    yield Piece("embed_VD", (), "model.embed_tokens.weight")
    yield Piece("norm_D", (), "model.norm.weight")
    if not config.tie_word_embeddings:
        yield Piece("head_VD", (), "lm_head.weight")
    for index in layer_indices(config):
        yield from _layer(config, index)
    if mtp:
        index = mtp_index(config)
        yield from _layer(config, index)
        prefix = f"model.layers.{index.layer}"
        yield Piece("mtp.projection_D2D", (), f"{prefix}.eh_proj.weight")
        yield Piece("mtp.embedding_norm_D", (), f"{prefix}.enorm.weight")
        yield Piece("mtp.hidden_norm_D", (), f"{prefix}.hnorm.weight")
        yield Piece("mtp.norm_D", (), f"{prefix}.shared_head.norm.weight")


def _layer(config: GlmConfig, index: LayerIndex) -> Iterator[Piece]:
    layer, prefix = (index.layer,), f"model.layers.{index.layer}"
    yield Piece("input_norm_LD", layer, f"{prefix}.input_layernorm.weight")
    yield Piece("post_attention_norm_LD", layer, f"{prefix}.post_attention_layernorm.weight")
    yield from _attention(config, layer, f"{prefix}.self_attn")
    if index.indexer == "full":
        yield from _indexer((index.index_ordinal,), f"{prefix}.self_attn.indexer")
    ordinal, mlp = (index.mlp_ordinal,), f"{prefix}.mlp"
    if index.mlp == "dense":
        yield from _swiglu("dense_gate_up_L2FD", "dense_down_LDF", ordinal, mlp)
        return
    yield Piece("experts.router_LED", ordinal, f"{mlp}.gate.weight")
    yield Piece("experts.router_bias_LE", ordinal, f"{mlp}.gate.e_score_correction_bias")
    yield from _swiglu("experts.shared_gate_up_L2FD", "experts.shared_down_LDF", ordinal, f"{mlp}.shared_experts")
    for expert in range(config.n_routed_experts):
        yield from _swiglu("experts.gate_up_LE2FD", "experts.down_LEDF", (*ordinal, expert), f"{mlp}.experts.{expert}")


def _attention(config: GlmConfig, layer: tuple[int, ...], prefix: str) -> Iterator[Piece]:
    nope, rows = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
    yield Piece("attention.q_a_LQD", layer, f"{prefix}.q_a_proj.weight")
    yield Piece("attention.q_a_norm_LQ", layer, f"{prefix}.q_a_layernorm.weight")
    yield Piece("attention.q_b_LNYQ", layer, f"{prefix}.q_b_proj.weight")
    yield Piece("attention.kv_a_LCD", layer, f"{prefix}.kv_a_proj_with_mqa.weight")
    yield Piece("attention.kv_a_norm_LR", layer, f"{prefix}.kv_a_layernorm.weight")
    yield Piece("attention.k_b_LNHR", layer, f"{prefix}.kv_b_proj.weight", (0, nope), rows)
    yield Piece("attention.v_b_LNOR", layer, f"{prefix}.kv_b_proj.weight", (nope, rows), rows)
    yield Piece("attention.o_LDNO", layer, f"{prefix}.o_proj.weight")
    if config.attention_bias:
        yield Piece("attention.q_a_bias_LQ", layer, f"{prefix}.q_a_proj.bias")
        yield Piece("attention.kv_a_bias_LC", layer, f"{prefix}.kv_a_proj_with_mqa.bias")
        yield Piece("attention.o_bias_LD", layer, f"{prefix}.o_proj.bias")


def _indexer(ordinal: tuple[int, ...], prefix: str) -> Iterator[Piece]:
    yield Piece("indexer.q_LIJQ", ordinal, f"{prefix}.wq_b.weight")
    yield Piece("indexer.k_LJD", ordinal, f"{prefix}.wk.weight")
    yield Piece("indexer.k_norm_LJ", ordinal, f"{prefix}.k_norm.weight")
    yield Piece("indexer.k_norm_bias_LJ", ordinal, f"{prefix}.k_norm.bias")
    yield Piece("indexer.head_weights_LID", ordinal, f"{prefix}.weights_proj.weight")


def _swiglu(gate_up: str, down: str, index: tuple[int, ...], prefix: str) -> Iterator[Piece]:
    yield Piece(gate_up, (*index, 0), f"{prefix}.gate_proj.weight")
    yield Piece(gate_up, (*index, 1), f"{prefix}.up_proj.weight")
    yield Piece(down, index, f"{prefix}.down_proj.weight")
