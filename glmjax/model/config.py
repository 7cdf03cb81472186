"""The configuration of a GLM-5-class model, read from a checkpoint's ``config.json``.

Names are those of Hugging Face's ``GlmMoeDsaConfig``; the rules by which absent fields are filled are those of the
published models. A configuration that cannot work is refused with the field, the value and the rule.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

MODEL_TYPE = "glm_moe_dsa"

MlpKind = Literal["dense", "sparse"]
IndexerKind = Literal["full", "shared"]


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, its value and the rule."""


@dataclasses.dataclass(frozen=True)
class Fp8Format:
    """How the matrices of an FP8 checkpoint are stored (``quantization_config``).

    Attributes:
        block: rows and columns of a matrix that share one scale, usually (128, 128). Blocks at the edges are partial.
    """

    block: tuple[int, int] = (128, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlmConfig:
    """Everything about a model that is not a weight. Hashable: jitted programs take it as a static value.

    Attributes:
        vocab_size: V, entries of the vocabulary.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: decoder layers, the MTP layer not counted.
        num_attention_heads: N.
        q_lora_rank: Q, width of the query's latent.
        kv_lora_rank: R, width of the cached latent.
        qk_nope_head_dim: H, part of a head's query and key without position.
        qk_rope_head_dim: P, rotated part, one key for all heads; even.
        v_head_dim: O, width of a head's value.
        intermediate_size: F of a dense MLP.
        moe_intermediate_size: F of one expert.
        n_routed_experts: E.
        num_experts_per_tok: X, experts chosen per token.
        n_shared_experts: experts every token takes, stored as one SwiGLU of that many times the width.
        n_group: groups the experts are divided into for routing.
        topk_group: groups a token may choose from.
        norm_topk_prob: whether the chosen experts' weights are normalised to sum to one.
        routed_scaling_factor: factor on the chosen experts' weights.
        mlp_layer_types: per layer, "dense" or "sparse".
        indexer_types: per layer, "full" (own indexer) or "shared" (selection of the nearest full layer below).
        index_topk: K, positions a query attends to at most.
        index_n_heads: I.
        index_head_dim: J; its first P entries are rotated.
        index_share_for_mtp_iteration: later draft steps reuse the selection of the first.
        rms_norm_eps: of all RMS norms but the two of the latents.
        latent_norm_eps: of q_a_layernorm and kv_a_layernorm: 1e-6 as in Hugging Face (vLLM takes rms_norm_eps).
        index_norm_eps: of the index keys' LayerNorm.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: longest context, in tokens.
        attention_bias: whether q_a, kv_a and o have a bias.
        tie_word_embeddings: whether the head is the embedding.
        num_nextn_predict_layers: MTP layers the checkpoint declares, 0 or 1.
        mtp_zero_first_embedding: zero the embedding of a sequence's very first MTP slot (vLLM does, Hugging Face's
            formulas and SGLang do not).
        eos_token_id: ids that end a generation.
        pad_token_id: id for padding, or None.
        quantization: FP8 block format of the checkpoint's matrices, or None.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    mlp_layer_types: tuple[MlpKind, ...]
    indexer_types: tuple[IndexerKind, ...]
    index_topk: int
    index_n_heads: int
    index_head_dim: int
    index_share_for_mtp_iteration: bool = False
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-6
    index_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 202752
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    mtp_zero_first_embedding: bool = False
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    quantization: Fp8Format | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for field in dataclasses.fields(self):
            if field.type in ("int", "float") and field.name != "num_nextn_predict_layers":
                self._require(0 < getattr(self, field.name) < math.inf, field.name, "must be positive and finite")
        self._require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "must be even: rotary pairs")
        self._require(
            self.index_head_dim >= self.qk_rope_head_dim,
            "index_head_dim",
            f"must be at least qk_rope_head_dim ({self.qk_rope_head_dim}): that part of an index key is rotated",
        )
        self._require(
            self.n_routed_experts % self.n_group == 0,
            "n_group",
            f"must divide n_routed_experts ({self.n_routed_experts})",
        )
        self._require(self.topk_group <= self.n_group, "topk_group", f"must not exceed n_group ({self.n_group})")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        self._require(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            f"must not exceed the {reachable} experts of topk_group groups",
        )
        self._require(
            self.n_group == 1 or self.n_routed_experts // self.n_group >= 2,
            "n_group",
            "leaves one expert a group, but a group's score is the sum of its best two",
        )
        for field in ("mlp_layer_types", "indexer_types"):
            named = len(getattr(self, field))
            rule = f"must name {self.num_hidden_layers} layers, names {named}"
            self._require(named == self.num_hidden_layers, field, rule)
        if self.indexer_types[0] != "full":
            raise ConfigError("indexer_types[0] is 'shared'; it must be full: no selection precedes layer 0")
        self._require(self.num_nextn_predict_layers in (0, 1), "num_nextn_predict_layers", "must be 0 or 1")
        inside = f"must lie in the vocabulary, 0..{self.vocab_size - 1}"
        self._require(all(0 <= token < self.vocab_size for token in self.eos_token_id), "eos_token_id", inside)
        self._require(self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size, "pad_token_id", inside)

    def _require(self, holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{field} is {getattr(self, field)!r}; it {rule}")

    @property
    def qk_head_dim(self) -> int:
        """Y = H + P, width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_row_dim(self) -> int:
        """C = R + P, width of a latent row: what attention caches per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores, Y^-0.5."""
        return self.qk_head_dim**-0.5

    @property
    def layers(self) -> tuple[tuple[MlpKind, IndexerKind], ...]:
        """The kind of every decoder layer, MTP not included."""
        return tuple(zip(self.mlp_layer_types, self.indexer_types, strict=True))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GlmConfig:
        """Read the published form.

        Args:
            raw: the parsed ``config.json``; null is the same as absent. Unknown keys are ignored, as are ``head_dim``
                (published values of it are unreliable) and ``indexer_rope_interleave`` (the indexer's rope is always
                interleaved, as in Hugging Face).

        Raises:
            ConfigError: another model type, a missing field, or a value the model cannot work with.
        """
        raw = _present(raw)
        if raw.get("model_type") != MODEL_TYPE:
            raise ConfigError(f"model_type is {raw.get('model_type')!r}; glmjax serves {MODEL_TYPE!r} only")
        fixed = {
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "mlp_bias": False,
            "moe_layer_freq": 1,
            "rope_interleave": True,
        }
        for field, only in fixed.items():
            if raw.get(field, only) != only:
                raise ConfigError(f"{field} is {raw[field]!r}; only {only!r} is implemented, as GLM-5 uses it")
        own = {f.name: f for f in dataclasses.fields(cls)}
        listed = ("mlp_layer_types", "indexer_types")
        for name, field in own.items():
            if field.default is dataclasses.MISSING and name not in raw and name not in listed:
                raise ConfigError(f"{name} is missing from the configuration; every {MODEL_TYPE} checkpoint has it")
        layers = _read(raw, "num_hidden_layers")
        values = {f.name: _read(raw, f.name, f.type) for f in own.values() if f.name in raw and f.type in _TYPES}
        values |= {
            "mlp_layer_types": _mlp_types(raw, layers),
            "indexer_types": _indexer_types(raw, layers),
            "rope_theta": _rope_theta(raw),
            "eos_token_id": _ids(raw, "eos_token_id"),
            "quantization": _quantization(raw),
        }
        return cls(**values)

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> GlmConfig:
        """Read ``config.json`` of a checkpoint's directory, or a JSON file named directly.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: not JSON, or refused as in `from_dict`.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no config.json at {file}; give a checkpoint's directory")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{file} holds a JSON {type(raw).__name__}; a configuration is an object")
        return cls.from_dict(raw)


def _present(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not None}


_TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "an integer"),
    "int | None": (int, "an integer"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "object": (Mapping, "an object"),
    "list": (list | tuple, "a list with the kind of every layer"),
}
"""What JSON may hold for a field's type, and how to say so."""


def _read(raw: Mapping[str, Any], field: str, kind: str = "int") -> Any:
    (types, what), value = _TYPES[kind], raw[field]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{field} is {value!r}; it must be {what}")
    return float(value) if kind == "float" else value


def _kinds(raw: Mapping[str, Any], field: str, allowed: tuple[str, ...]) -> tuple[Any, ...]:
    kinds = _read(raw, field, "list")
    for layer, kind in enumerate(kinds):
        if kind not in allowed:
            raise ConfigError(f"{field}[{layer}] is {kind!r}; it must be one of {', '.join(allowed)}")
    return tuple(kinds)


def _mlp_types(raw: Mapping[str, Any], layers: int) -> tuple[MlpKind, ...]:
    """The list where there is one, else dense × first_k_dense_replace, then sparse."""
    if "mlp_layer_types" in raw:
        return _kinds(raw, "mlp_layer_types", ("dense", "sparse"))
    dense = _read({"first_k_dense_replace": 3, **raw}, "first_k_dense_replace")
    if dense < 0:
        raise ConfigError(f"first_k_dense_replace is {dense}; it must not be negative")
    dense = min(dense, layers)
    return ("dense",) * dense + ("sparse",) * (layers - dense)


def _indexer_types(raw: Mapping[str, Any], layers: int) -> tuple[IndexerKind, ...]:
    """The list; else the pattern "FSS…"; else frequency and offset."""
    if "indexer_types" in raw:
        return _kinds(raw, "indexer_types", ("full", "shared"))
    if "index_topk_pattern" in raw:
        pattern = raw["index_topk_pattern"]
        if not isinstance(pattern, str) or not set(pattern) <= set("FS") or len(pattern) != layers:
            raise ConfigError(
                f"index_topk_pattern is {pattern!r}; it must be a string of {layers} letters, one per layer: "
                "F (full) or S (shared)"
            )
        return tuple("full" if letter == "F" else "shared" for letter in pattern)
    frequency = _read({"index_topk_freq": 1, **raw}, "index_topk_freq")
    offset = _read({"index_skip_topk_offset": 2, **raw}, "index_skip_topk_offset")
    if frequency < 1:
        raise ConfigError(f"index_topk_freq is {frequency}; it must be positive")
    return tuple("full" if max(i - offset + 1, 0) % frequency == 0 else "shared" for i in range(layers))


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """``rope_parameters.rope_theta``, else ``rope_theta``, else 10000."""
    parameters: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        parameters |= _present(_read({field: {}, **raw}, field, "object"))
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{field}.rope_type is {kind!r}; only 'default' is implemented, as GLM-5 uses it")
    return _read({"rope_theta": 10000.0, **raw, **parameters}, "rope_theta", "float")


def _ids(raw: Mapping[str, Any], field: str) -> tuple[int, ...]:
    value = raw.get(field, ())
    if not isinstance(value, list | tuple):
        return (_read(raw, field),)
    return tuple(_read({f"{field}[{n}]": token}, f"{field}[{n}]") for n, token in enumerate(value))


def _quantization(raw: Mapping[str, Any]) -> Fp8Format | None:
    if "quantization_config" not in raw:
        return None
    stored = _present(_read(raw, "quantization_config", "object"))
    method, fmt = stored.get("quant_method"), stored.get("fmt", "e4m3")
    if method != "fp8" or fmt != "e4m3":
        raise ConfigError(
            f"quantization_config has quant_method {method!r}, fmt {fmt!r}; fp8 with e4m3 is what can be read "
            "(or load the bf16 checkpoint)"
        )
    if "weight_block_size" not in stored:
        raise ConfigError("quantization_config has no weight_block_size; one scale per block is what can be read")
    block = stored["weight_block_size"]
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ConfigError(f"quantization_config.weight_block_size is {block!r}; it must be two positive integers")
    return Fp8Format(block=(block[0], block[1]))
