"""The published models, abstractly: sizes, groups, tensor names and storage, with nothing allocated."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from safetensors import safe_open

from glmjax.model import names
from glmjax.model.census import MTP, abstract, active, census, stored_bytes, table
from glmjax.model.config import Fp8Format, GlmConfig

ROOT = Path(__file__).parents[2]
CONFIG = {
    name: GlmConfig.from_dir(ROOT / "configs" / f"{name}.json") for name in ("glm-5", "glm-5.1", "glm-5.2", "nano")
}
PUBLISHED = ("glm-5", "glm-5.1", "glm-5.2")


def weights(model) -> dict[str, jax.ShapeDtypeStruct]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


# Sizes.


@pytest.mark.parametrize("name", ["glm-5", "glm-5.1"])
def test_glm_5_has_744b_parameters_without_mtp_and_the_mtp_layer_adds_10b(name):
    """The published "744B" is the model without its MTP layer, 743.91B; with it, a checkpoint stores 753.86B."""
    counts = census(CONFIG[name])
    total = sum(counts.values())
    assert total - counts[MTP] == 743_911_218_432
    assert counts[MTP] == 9_952_920_576
    assert total - counts[MTP] == pytest.approx(744e9, rel=0.01)


def test_glm_5_2_stores_753_33b_parameters_with_mtp():
    """The published "753.33B" is the checkpoint with its MTP layer, to the last digit; 743.38B without.

    It is GLM-5.1 less the 57 indexers that the shared layers do not have.
    """
    old, new = census(CONFIG["glm-5.1"]), census(CONFIG["glm-5.2"])
    assert sum(new.values()) == pytest.approx(753.33e9, abs=0.005e9)
    indexer = 32 * 128 * 2048 + 128 * 6144 + 2 * 128 + 32 * 6144
    assert {group for group in old if old[group] != new[group]} == {"indexer"}
    assert old["indexer"] == 78 * indexer
    assert new["indexer"] == 21 * indexer


@pytest.mark.parametrize("name", PUBLISHED)
def test_40b_parameters_are_active_per_token(name):
    assert active(CONFIG[name]) == pytest.approx(40e9, rel=0.03)


def test_groups_of_glm_5_1_against_the_sizes_in_its_configuration():
    d, n, q, r, p, h, o = 6144, 64, 2048, 512, 64, 192, 256
    attention = q * d + q + n * (h + p) * q + (r + p) * d + r + n * (h + o) * r + d * n * o
    indexer = 32 * 128 * q + 128 * d + 2 * 128 + 32 * d
    expert = 3 * 2048 * d
    router = 256 * d + 256
    assert census(CONFIG["glm-5.1"]) == {
        "embedding": 154880 * d,
        "attention": 78 * attention,
        "indexer": 78 * indexer,
        "dense MLPs": 3 * 3 * 12288 * d,
        "routed experts": 75 * 256 * expert,
        "shared experts": 75 * expert,
        "routers": 75 * router,
        "norms": (2 * 78 + 1) * d,
        "head": 154880 * d,
        MTP: attention + indexer + 257 * expert + router + 2 * d + (2 * d * d + 3 * d),
    }


@pytest.mark.parametrize("name", CONFIG)
def test_every_weight_is_counted_once(name):
    config = CONFIG[name]
    allocated = sum(array.size for array in weights(abstract(config, mtp=True)).values())
    assert sum(census(config).values()) == allocated


def test_a_model_without_mtp_experts_and_head_of_its_own():
    """Only layer 0 of the nano model, tied."""
    config = dataclasses.replace(
        CONFIG["nano"],
        num_hidden_layers=1,
        mlp_layer_types=("dense",),
        indexer_types=("full",),
        num_nextn_predict_layers=0,
        tie_word_embeddings=True,
    )
    counts = census(config)
    assert {group for group, count in counts.items() if not count} == {
        "routed experts",
        "shared experts",
        "routers",
        "head",
        MTP,
    }
    assert active(config) == sum(counts.values())  # the embedding is the head: it multiplies


@pytest.mark.parametrize("name", ["glm-5.1", "glm-5.2"])
def test_nothing_is_allocated(name):
    before = sum(array.nbytes for array in jax.live_arrays())
    tracemalloc.start()
    model = abstract(CONFIG[name], mtp=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert sum(array.nbytes for array in jax.live_arrays()) <= before
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in weights(model).values())


# Storage.


def test_bf16_except_for_the_routers_bias():
    for path, array in weights(abstract(CONFIG["glm-5.1"], mtp=True)).items():
        assert array.dtype == (jnp.float32 if path == "experts.router_bias_LE.values" else jnp.bfloat16), path


def test_bytes_in_bf16():
    config = CONFIG["glm-5.1"]
    biases = 76 * 256
    assert stored_bytes(abstract(config, mtp=True)) == 2 * sum(census(config).values()) + 2 * biases


FP8 = dataclasses.replace(CONFIG["glm-5.1"], quantization=Fp8Format())

FP8_SCALES = {
    "attention.q_a_LQD": (79, 2048 // 128, 6144 // 128),
    "attention.q_b_LNYQ": (79, 64, 256 // 128, 2048 // 128),
    "attention.kv_a_LCD": (79, 5, 6144 // 128),  # 576 rows: the last block is half full
    "attention.k_b_LNHR": (79, 64, 192 // 64, 512 // 128),  # a head's 192 + 256 rows of kv_b are cut at gcd(192, 256)
    "attention.v_b_LNOR": (79, 64, 256 // 64, 512 // 128),
    "attention.o_LDNO": (79, 6144 // 128, 64, 256 // 128),
    "indexer.q_LIJQ": (79, 32, 1, 2048 // 128),
    "indexer.k_LJD": (79, 1, 6144 // 128),
    "dense_gate_up_L2FD": (3, 2, 12288 // 128, 6144 // 128),
    "dense_down_LDF": (3, 6144 // 128, 12288 // 128),
    "experts.gate_up_LE2FD": (76, 256, 2, 2048 // 128, 6144 // 128),
    "experts.down_LEDF": (76, 256, 6144 // 128, 2048 // 128),
    "experts.shared_gate_up_L2FD": (76, 2, 2048 // 128, 6144 // 128),
    "experts.shared_down_LDF": (76, 6144 // 128, 2048 // 128),
}
"""Shape of the scales of every matrix that model-spec.md lists as quantised; no other weight has any."""


def test_fp8_keeps_the_matrices_that_an_fp8_checkpoint_quantises():
    arrays = weights(abstract(FP8, mtp=True, fp8=True))
    scales = {path.removesuffix(".scale"): array for path, array in arrays.items() if path.endswith(".scale")}
    assert {path: array.shape for path, array in scales.items()} == FP8_SCALES
    assert {array.dtype for array in scales.values()} == {jnp.dtype("float32")}
    eight_bit = {path for path, array in arrays.items() if array.dtype == jnp.uint8}
    assert eight_bit == {f"{path}.values" for path in FP8_SCALES}


def test_fp8_blocks_of_the_halves_of_kv_b_are_64_rows():
    attention = abstract(FP8, mtp=True, fp8=True).attention
    assert attention.k_b_LNHR.block == attention.v_b_LNOR.block == (1, 1, 64, 128)
    assert attention.o_LDNO.block == (1, 128, 1, 128)


def test_fp8_shapes_of_values_are_those_of_bf16():
    fp8, bf16 = weights(abstract(FP8, mtp=True, fp8=True)), weights(abstract(FP8, mtp=True))
    assert {path: array.shape for path, array in fp8.items() if path.endswith(".values")} == {
        path: array.shape for path, array in bf16.items()
    }


def test_bytes_in_fp8_are_values_and_scales():
    arrays = weights(abstract(FP8, mtp=True))
    quantised = sum(array.size for path, array in arrays.items() if path.removesuffix(".values") in FP8_SCALES)
    scales = sum(4 * math.prod(shape) for shape in FP8_SCALES.values())
    rest = sum(a.size * a.dtype.itemsize for p, a in arrays.items() if p.removesuffix(".values") not in FP8_SCALES)
    assert stored_bytes(abstract(FP8, mtp=True, fp8=True)) == quantised + scales + rest


# Names of the checkpoint's tensors, written out from model-spec.md.

ATTENTION = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
LAYER = ["input_layernorm.weight", "post_attention_layernorm.weight", *(f"self_attn.{n}.weight" for n in ATTENTION)]
INDEXER = [
    *(f"self_attn.indexer.{name}.weight" for name in ("wq_b", "wk", "weights_proj", "k_norm")),
    "self_attn.indexer.k_norm.bias",
]
SWIGLU = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
DENSE = [f"mlp.{name}" for name in SWIGLU]
SPARSE = [
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    *(f"mlp.shared_experts.{name}" for name in SWIGLU),
]
EXPERT = [f"mlp.experts.{{}}.{name}" for name in SWIGLU]
BIASES = [f"self_attn.{name}.bias" for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")]
MTP_OWN = ["eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"]


@functools.cache
def our_tensors(config: GlmConfig, mtp: bool) -> frozenset[str]:
    return frozenset(piece.tensor for piece in names.pieces(config, mtp=mtp))


def layer_tensors(kind: str, experts: int) -> set[str]:
    """Of one layer; `kind` is full or shared, then dense, sparse or mtp."""
    indexer, mlp = kind.split()
    tensors = set(LAYER) | (set(INDEXER) if indexer == "full" else set())
    if mlp == "dense":
        return tensors | set(DENSE)
    tensors |= set(SPARSE) | {name.format(expert) for expert in range(experts) for name in EXPERT}
    return tensors | (set(MTP_OWN) if mlp == "mtp" else set())


def published_tensors(kinds: list[str], experts: int) -> set[str]:
    """Of a model whose layers are of these kinds."""
    tensors = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, kind in enumerate(kinds):
        tensors |= {f"model.layers.{layer}.{name}" for name in layer_tensors(kind, experts)}
    return tensors


KINDS = {
    "glm-5": ["full dense"] * 3 + ["full sparse"] * 75 + ["full mtp"],
    "glm-5.1": ["full dense"] * 3 + ["full sparse"] * 75 + ["full mtp"],
    "glm-5.2": ["full dense"] * 3
    + [f"{'full' if layer % 4 == 2 else 'shared'} sparse" for layer in range(3, 78)]
    + ["full mtp"],
    "nano": ["full dense"] + ["full sparse"] * 4 + ["full mtp"],
}


@pytest.mark.parametrize(("name", "count"), [("glm-5", 59870), ("glm-5.1", 59870), ("glm-5.2", 59585), ("nano", 359)])
def test_tensors_of_the_published_checkpoints(name, count):
    config = CONFIG[name]
    ours = our_tensors(config, mtp=True)
    expected = published_tensors(KINDS[name], config.n_routed_experts)
    assert ours ^ expected == set()
    assert len(ours) == count


@pytest.mark.parametrize(("name", "layer"), [("glm-5.2", 0), ("glm-5.2", 3), ("glm-5.2", 6), ("glm-5.2", 78)])
def test_tensors_of_a_layer_by_its_kind(name, layer):
    kind, prefix = KINDS[name][layer], f"model.layers.{layer}."
    ours = {t.removeprefix(prefix) for t in our_tensors(CONFIG[name], mtp=True) if t.startswith(prefix)}
    assert ours == layer_tensors(kind, 256)
    assert len(ours) == {"full dense": 17, "shared sparse": 782, "full sparse": 787, "full mtp": 791}[kind]


def test_without_mtp_no_tensor_lies_beyond_the_last_layer():
    assert our_tensors(CONFIG["glm-5.2"], mtp=False) == published_tensors(KINDS["glm-5.2"][:-1], 256)


def test_a_tied_head_has_no_tensor_and_biases_have_theirs():
    config = dataclasses.replace(CONFIG["nano"], tie_word_embeddings=True, attention_bias=True)
    biases = {f"model.layers.{layer}.{name}" for layer in range(6) for name in BIASES}
    expected = published_tensors(KINDS["nano"], config.n_routed_experts) - {"lm_head.weight"} | biases
    assert our_tensors(config, mtp=True) == expected


def stored_names(folder: Path) -> set[str]:
    """Of a checkpoint that save_pretrained wrote, its MTP layer beside it in a file of its own."""
    stored: set[str] = set()
    for file in (folder / "model.safetensors", folder / "mtp.safetensors"):
        if file.exists():
            with safe_open(file, "numpy") as tensors:
                stored |= set(tensors.keys())
    return stored


@pytest.mark.parametrize("name", ["sparse", "shared_indexer", "grouped", "dense", "fp8"])
def test_tensors_of_the_golden_checkpoints(name):
    folder = ROOT / "tests" / "golden" / name
    config, mtp = GlmConfig.from_dir(folder), (folder / "mtp.safetensors").exists()
    stored = stored_names(folder)
    scales = {tensor for tensor in stored if tensor.endswith("_scale_inv")}
    assert stored - scales == our_tensors(config, mtp=mtp)
    model = weights(abstract(config, mtp=mtp, fp8=config.quantization is not None))
    quantised = {p.tensor for p in names.pieces(config, mtp=mtp) if f"{p.weight}.scale" in model}
    assert scales == {f"{tensor}_scale_inv" for tensor in quantised}
    assert bool(scales) == (name == "fp8")


@pytest.mark.parametrize("name", ["glm-5.2", "nano"])
@pytest.mark.parametrize("mtp", [True, False])
def test_every_entry_of_every_weight_is_filled_exactly_once(name, mtp):
    """The indices of the pieces of a weight are all those of its leading dimensions; kv_b's two halves cover its rows."""
    config = CONFIG[name]
    arrays = {path.removesuffix(".values"): a for path, a in weights(abstract(config, mtp=mtp)).items()}
    filled: dict[str, list[tuple[int, ...]]] = {path: [] for path in arrays}
    halves: dict[str, list[tuple[int, int]]] = {}
    for piece in names.pieces(config, mtp=mtp):
        filled[piece.weight].append(piece.index)
        if piece.row_range is not None:
            halves.setdefault(piece.tensor, []).append(piece.row_range)
    for path, indices in filled.items():
        depth = len(indices[0])
        entries = set(_indices(arrays[path].shape[:depth]))
        assert len(indices) == len(entries), path
        assert set(indices) == entries, path
    rows = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
    assert len(halves) == config.num_hidden_layers + mtp
    assert all(sorted(ranges) == [(0, rows[0]), rows] for ranges in halves.values())


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for length in shape:
        indices = [(*index, n) for index in indices for n in range(length)]
    return indices


# The printed table.


def test_the_table_says_what_the_census_counts():
    lines = {line[:26].strip(): line[26:].split() for line in table(CONFIG["glm-5.2"]).splitlines()}
    assert lines["total"] == ["753,329,940,480", "753.33B"]
    assert lines["total without MTP"] == ["743,377,019,904", "743.38B"]
    assert lines["active per token"] == ["40,298,947,584", "40.30B"]
    assert lines["bytes in bf16"][0] == f"{2 * 753_329_940_480 + 2 * 76 * 256:,}"
    assert lines["checkpoint tensors, bf16"] == ["59,585"]
    assert lines["indexer"][0] == f"{census(CONFIG['glm-5.2'])['indexer']:,}"


def test_the_command_prints_the_table():
    command = [sys.executable, "-m", "glmjax.model.census", "configs/nano.json"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == table(CONFIG["nano"]) + "\n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_hold_the_published_keys(name):
    raw = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    assert raw["first_k_dense_replace"] == 3
    assert raw["num_key_value_heads"] == raw["num_attention_heads"] == 64
    assert raw["qk_head_dim"] == raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"] == 256
    assert set(raw["rope_parameters"]) == {"rope_theta", "rope_type"}
    assert "head_dim" not in raw  # published values of it are unreliable
