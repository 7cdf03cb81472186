"""Loading, saving and converting: every entry of every weight against the published tensors, and what is refused."""

import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from glmjax.model import checkpoint
from glmjax.model.assemble import named_weights
from glmjax.model.config import ConfigError, GlmConfig
from glmjax.model.names import pieces
from glmjax.model.shards import CheckpointError, Shards

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SETS = ("sparse", "shared_indexer", "grouped", "dense")
BF16, F32, FP8 = ml_dtypes.bfloat16, np.float32, ml_dtypes.float8_e4m3fn
BIAS = "e_score_correction_bias"
BLOCKS = ((16, 24), (7, 5))
"""Of FP8: partial at the edges and inside heads; with nothing in common with any length. The golden set has 128 × 128."""

UNQUANTISED = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj", "eh_proj", "bias")


# Checkpoints.


def raw_of(name, **changes):
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def published(directory):
    return {name: np.array(tensor.read()) for name, tensor in Shards.open(directory).items()}


def write(directory, tensors, raw, files=1):
    """A checkpoint, dealt out to files with an index where there are several."""
    directory.mkdir(exist_ok=True)
    names = [f"model-{n + 1:05}-of-{files:05}.safetensors" for n in range(files)]
    where = {name: names[n % files] for n, name in enumerate(tensors)}
    for file in names:
        save_file(
            {name: np.ascontiguousarray(tensors[name]) for name in where if where[name] == file}, directory / file
        )
    if files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def as_dtype(tensors, dtype):
    return {name: array if name.endswith(BIAS) else array.astype(dtype) for name, array in tensors.items()}


def quantised(tensors, block, rng):
    """Every matrix that model-spec.md lists, as random FP8 numbers with random scales."""
    found = {}
    for name, array in tensors.items():
        if any(part in name for part in UNQUANTISED):
            found[name] = array.astype(F32)
            continue
        found[name] = rng.standard_normal(array.shape).astype(FP8)
        scales = [-(-n // b) for n, b in zip(array.shape, block, strict=True)]
        found[name + "_scale_inv"] = rng.uniform(0.01, 0.1, scales).astype(F32)
    return found


def dequantised(tensors, block):
    """The definition: W[i, j] = q[i, j] · s[i // rows, j // columns]."""
    rows, columns = block
    found = {name: array for name, array in tensors.items() if not name.endswith("_scale_inv")}
    for name, array in found.items():
        if array.dtype == FP8:
            found[name] = array.astype(F32)
            for (i, j), scale in np.ndenumerate(tensors[name + "_scale_inv"]):
                found[name][i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] *= scale
    return found


def fp8_raw(block, **changes):
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    return raw_of("sparse", quantization_config=quantization | {"modules_to_not_convert": ["lm_head"]}, **changes)


@pytest.fixture(scope="module")
def fp8_checkpoints(tmp_path_factory):
    """By block: the directory and its dequantised tensors."""
    found = {}
    for block in BLOCKS:
        tensors = quantised(published(GOLDEN / "sparse"), block, np.random.default_rng(1))
        directory = write(tmp_path_factory.mktemp("fp8") / "model", tensors, fp8_raw(block), files=2)
        found[block] = directory, dequantised(tensors, block)
    return found


# Comparisons.


def entries(model):
    """Every piece with the weight it fills."""
    weights = named_weights(model)
    for piece in pieces(model.config, mtp=model.mtp is not None):
        yield piece, weights[piece.weight]


@functools.partial(jax.jit, static_argnames="dtype")
def entry(stack, index, dtype):
    """What `Weight.at` gives."""
    return stack.at(*index, dtype=dtype)


def same_as(model, tensors, dtype=F32):
    """Every entry of every weight has the tensor's bits in `dtype` (the routers' bias in float32)."""
    seen = set()
    for piece, weight in entries(model):
        seen.add(piece.tensor)
        tensor = tensors[piece.tensor]
        if piece.row_range is not None:
            begin, end = piece.row_range
            tensor = tensor.reshape(-1, piece.head_rows, tensor.shape[-1])[:, begin:end]
        kind = F32 if piece.tensor.endswith(BIAS) else dtype
        found = np.asarray(entry(weight.stack, piece.index, kind))
        assert found.dtype == kind, piece
        np.testing.assert_array_equal(found, tensor.reshape(found.shape).astype(kind), err_msg=str(piece))
    assert seen == set(tensors)


def arrays(model):
    return {
        name + suffix: np.asarray(array)
        for name, weight in named_weights(model).items()
        for suffix, array in (("", weight.array), (".scale", weight.scales))
        if array is not None
    }


def identical(found, wanted):
    found, wanted = arrays(found), arrays(wanted)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# What is loaded.


@pytest.mark.parametrize("name", SETS)
def test_every_entry_of_a_published_checkpoint(name):
    """All four have an index; sparse and shared_indexer keep the MTP layer in a file of its own, grouped has biases."""
    same_as(checkpoint.load(GOLDEN / name), published(GOLDEN / name))


@pytest.mark.parametrize("files", [1, 3])
def test_one_file_without_an_index_and_several_with_one(tmp_path, files):
    tensors = published(GOLDEN / "dense")
    same_as(checkpoint.load(write(tmp_path / "model", tensors, raw_of("dense"), files)), tensors)


@pytest.mark.parametrize(("stored", "wanted"), [(BF16, F32), (F32, BF16), (BF16, BF16), (np.float16, F32)])
def test_dtypes_are_converted_but_the_routers_bias_is_not(tmp_path, stored, wanted):
    tensors = as_dtype(published(GOLDEN / "grouped"), stored)
    model = checkpoint.load(write(tmp_path / "model", tensors, raw_of("grouped")), dtype=wanted)
    same_as(model, tensors, wanted)
    assert model.experts.router_bias_LE.array.dtype == F32
    assert model.dtype == wanted


def test_a_routers_bias_stored_in_bf16_becomes_float32(tmp_path):
    tensors = {name: array.astype(BF16) for name, array in published(GOLDEN / "grouped").items()}
    same_as(checkpoint.load(write(tmp_path / "model", tensors, raw_of("grouped")), dtype=jnp.bfloat16), tensors, BF16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", np.float32, jnp.bfloat16])
def test_a_dtype_can_be_a_name(dtype):
    assert checkpoint.load(GOLDEN / "dense", dtype=dtype).dtype == jnp.dtype(dtype)


def test_the_default_dtype_on_a_cpu_is_float32():
    assert checkpoint.load(GOLDEN / "dense").dtype == F32


def test_a_tied_head(tmp_path):
    tensors = published(GOLDEN / "dense")
    del tensors["lm_head.weight"]
    model = checkpoint.load(write(tmp_path / "model", tensors, raw_of("dense", tie_word_embeddings=True)))
    assert model.head_VD is None
    same_as(model, tensors)


# FP8.


@pytest.mark.parametrize("block", BLOCKS)
def test_fp8_kept_has_the_published_bits_and_scales(fp8_checkpoints, block):
    directory, tensors = fp8_checkpoints[block]
    model = checkpoint.load(directory)
    assert model.attention.k_b_LNHR.array.dtype == jnp.uint8
    same_as(model, tensors)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("block", BLOCKS)
def test_fp8_dequantised_as_it_is_loaded(fp8_checkpoints, block, dtype):
    directory, tensors = fp8_checkpoints[block]
    model = checkpoint.load(directory, dtype=dtype, fp8="dequantize")
    assert all(weight.scale is None for weight in named_weights(model).values())
    same_as(model, tensors, dtype)


def test_fp8_of_the_golden_checkpoint():
    tensors = dequantised(published(GOLDEN / "fp8"), (128, 128))
    same_as(checkpoint.load(GOLDEN / "fp8"), tensors)
    same_as(checkpoint.load(GOLDEN / "fp8", fp8="dequantize"), tensors)


def test_what_is_not_fp8_has_the_models_dtype(fp8_checkpoints):
    model = checkpoint.load(fp8_checkpoints[16, 24][0], dtype=jnp.bfloat16)
    for name, weight in named_weights(model).items():
        if weight.scale is None:
            assert weight.array.dtype == (F32 if name.endswith("router_bias_LE") else jnp.bfloat16), name
        else:
            assert weight.scales.dtype == F32


def test_a_matrix_left_unquantised_is_refused_with_the_remedy_which_helps(tmp_path):
    """As modules_to_not_convert allows: the model has one storage per stack."""
    tensors = quantised(published(GOLDEN / "sparse"), (16, 24), np.random.default_rng(2))
    plain = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 3)]
    for name in plain:
        tensors[name] = tensors[name].astype(BF16)
        del tensors[name + "_scale_inv"]
    directory = write(tmp_path / "model", tensors, fp8_raw((16, 24)))
    message = refusal(directory)
    assert "not FP8 (load with fp8='dequantize') (2)" in message
    assert all(name in message for name in plain)
    same_as(checkpoint.load(directory, fp8="dequantize"), dequantised(tensors, (16, 24)))


# MTP.


def layer_of(tensors, layer):
    return [name for name in tensors if name.startswith(f"model.layers.{layer}.")]


def test_mtp_is_there_if_the_checkpoint_has_it():
    assert checkpoint.load(GOLDEN / "sparse").mtp is not None
    assert checkpoint.load(GOLDEN / "sparse", mtp=True).mtp is not None


def test_mtp_that_save_pretrained_dropped_is_absent(tmp_path):
    tensors = published(GOLDEN / "sparse")
    for name in layer_of(tensors, 5):
        del tensors[name]
    directory = write(tmp_path / "model", tensors, raw_of("sparse"))
    model = checkpoint.load(directory)
    assert model.mtp is None
    same_as(model, tensors)
    assert "has no MTP layer" in refusal(directory, mtp=True)


def test_mtp_can_be_left_out(tmp_path):
    tensors = published(GOLDEN / "sparse")
    model = checkpoint.load(GOLDEN / "sparse", mtp=False)
    assert model.mtp is None
    same_as(model, {name: tensors[name] for name in set(tensors) - set(layer_of(tensors, 5))})


def test_mtp_that_is_partly_there_is_refused(tmp_path):
    tensors = published(GOLDEN / "sparse")
    gone = layer_of(tensors, 5)[::2]
    for name in gone:
        del tensors[name]
    message = refusal(write(tmp_path / "model", tensors, raw_of("sparse")))
    assert f"missing ({len(gone)})" in message
    assert all(name in message for name in sorted(gone)[:20])


def test_mtp_that_the_configuration_does_not_declare_is_refused(tmp_path):
    tensors = published(GOLDEN / "sparse")
    message = refusal(write(tmp_path / "model", tensors, raw_of("sparse", num_nextn_predict_layers=0)))
    assert f"unknown to this configuration ({len(layer_of(tensors, 5))})" in message


# Saved and converted.


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["shared_indexer", "grouped"])
def test_saved_and_loaded_is_the_same_model_and_the_same_tensors(tmp_path, name, dtype):
    model = checkpoint.load(GOLDEN / name, dtype=dtype)
    checkpoint.save(model, tmp_path / "saved", raw_of(name))
    found, wanted = published(tmp_path / "saved"), as_dtype(published(GOLDEN / name), dtype)
    assert set(found) == set(wanted)
    for tensor, array in wanted.items():
        assert found[tensor].dtype == array.dtype, tensor
        np.testing.assert_array_equal(found[tensor], array, err_msg=tensor)
    identical(checkpoint.load(tmp_path / "saved", dtype=dtype), model)


def test_a_saved_fp8_model_is_dequantised_and_loads_as_such(fp8_checkpoints, tmp_path):
    directory, tensors = fp8_checkpoints[16, 24]
    checkpoint.save(checkpoint.load(directory), tmp_path / "saved", fp8_raw((16, 24)))
    assert GlmConfig.from_dir(tmp_path / "saved").quantization is None
    same_as(checkpoint.load(tmp_path / "saved"), tensors)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, fp8_checkpoints):
    """Orbax directories of sparse and of an FP8 checkpoint."""
    root = tmp_path_factory.mktemp("orbax")
    checkpoint.convert(GOLDEN / "sparse", root / "sparse")
    checkpoint.convert(fp8_checkpoints[16, 24][0], root / "fp8")
    return root


def test_converted_and_loaded_is_the_same_model(converted, fp8_checkpoints):
    identical(checkpoint.load(converted / "sparse"), checkpoint.load(GOLDEN / "sparse"))
    identical(checkpoint.load(converted / "fp8"), checkpoint.load(fp8_checkpoints[16, 24][0]))


def test_a_converted_checkpoint_takes_another_dtype(converted):
    wanted = checkpoint.load(GOLDEN / "sparse", dtype=jnp.bfloat16)
    identical(checkpoint.load(converted / "sparse", dtype=jnp.bfloat16), wanted)


def test_large_arrays_are_converted_and_read_in_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "_CHUNK", 10_000)  # no multiple of any row
    checkpoint.convert(GOLDEN / "dense", tmp_path / "target")
    identical(checkpoint.load(tmp_path / "target"), checkpoint.load(GOLDEN / "dense"))


def test_the_mtp_layer_of_a_converted_checkpoint_can_be_left_out(converted):
    identical(checkpoint.load(converted / "sparse", mtp=False), checkpoint.load(GOLDEN / "sparse", mtp=False))


def test_a_converted_checkpoint_without_mtp(tmp_path):
    checkpoint.convert(GOLDEN / "dense", tmp_path / "target")
    assert checkpoint.load(tmp_path / "target").mtp is None
    assert "without an MTP layer" in refusal(tmp_path / "target", mtp=True)


def test_a_converted_fp8_checkpoint_is_not_dequantised_unasked(converted):
    assert "converted as FP8" in refusal(converted / "fp8", fp8="dequantize")


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "dense", source)
    beside = {"tokenizer.json", "chat_template.jinja", "merges.txt", "README.md", "LICENSE"}
    for name in beside:
        (source / name).write_text("{}")
    checkpoint.convert(source, tmp_path / "target")
    found = {file.name for file in (tmp_path / "target").iterdir()}
    assert found == beside | {"config.json", "generation_config.json", "meta.json", "glmjax.json", "weights"}


def test_a_target_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty; give a new directory"):
        checkpoint.convert(GOLDEN / "dense", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_converted_directory_that_does_not_fit_its_configuration(converted, tmp_path):
    shutil.copytree(converted / "sparse", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw_of("sparse", vocab_size=161, index_n_heads=8)))
    message = refusal(tmp_path / "other")
    for name in ("embed_VD", "head_VD", "indexer.q_LIJQ", "indexer.head_weights_LID"):
        assert f"{name} is (" in message
    assert "norm_D" not in message


def test_weights_without_the_facts_of_the_conversion(converted, tmp_path):
    shutil.copytree(converted / "sparse", tmp_path / "other")
    (tmp_path / "other" / "glmjax.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no glmjax\.json"):
        checkpoint.load(tmp_path / "other")


@pytest.mark.slow
def test_the_command_converts_and_lists(tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "glmjax.model.checkpoint", *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    target = tmp_path / "target"
    assert command("convert", GOLDEN / "dense", target) == f"converted {GOLDEN / 'dense'} to {target}\n"
    identical(checkpoint.load(target), checkpoint.load(GOLDEN / "dense"))
    lines = command("names", GOLDEN / "dense").splitlines()
    assert len(lines) == 80
    assert lines == sorted(lines)
    assert "model.embed_tokens.weight  float32  [160, 64]" in lines


# Random weights.


@pytest.fixture
def quick():
    """Random numbers whose programs compile in a third of the time."""
    with jax.default_prng_impl("rbg"):
        yield


@pytest.mark.usefixtures("quick")
def test_dummy_weights_are_finite_and_follow_the_seed(tmp_path):
    """Only the configuration is needed."""
    shutil.copy(GOLDEN / "sparse" / "config.json", tmp_path)
    one, again, other = (checkpoint.load(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    identical(one, again)
    assert not np.array_equal(one.embed_VD.array, other.embed_VD.array)
    for name, array in arrays(one).items():
        assert np.isfinite(array).all(), name
        assert array.std() > 0 or "norm" in name or "bias" in name, name


@pytest.mark.usefixtures("quick")
def test_dummy_fp8_weights_are_finite(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fp8_raw((16, 24))))
    model = checkpoint.load(tmp_path, load_format="dummy")
    kept = {name: weight for name, weight in named_weights(model).items() if weight.scale is not None}
    assert len(kept) == 14
    for name, weight in kept.items():
        assert weight.array.dtype == jnp.uint8
        assert np.isfinite(np.asarray(weight.array).view(FP8).astype(F32)).all(), name
        assert np.isfinite(np.asarray(weight.scales)).all(), name


# Refusals.


def refusal(directory, **options):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(directory, **options)
    return str(caught.value)


def test_everything_wrong_is_in_one_message(tmp_path):
    tensors = published(GOLDEN / "sparse")
    layer = "model.layers.2"
    del tensors["model.norm.weight"], tensors[f"{layer}.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.9.mlp.gate.weight"] = tensors[f"{layer}.mlp.gate.weight"]
    tensors["model.embed_tokens.weight_scale_inv"] = np.ones((2, 1), F32)  # of a tensor that is not FP8
    transposed = [f"{layer}.self_attn.kv_b_proj.weight", f"{layer}.mlp.experts.0.down_proj.weight"]
    for name in transposed:
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors[f"{layer}.input_layernorm.weight"] = tensors[f"{layer}.input_layernorm.weight"][None]
    tensors[f"{layer}.self_attn.o_proj.weight"] = tensors[f"{layer}.self_attn.o_proj.weight"].astype(np.int32)
    message = refusal(write(tmp_path / "model", tensors, raw_of("sparse")))
    lines = {line.split(" (")[0].strip(): line for line in message.splitlines()[1:]}
    assert set(lines) == {"missing", "misshapen", "not floating point", "unknown to this configuration"}
    assert lines["missing"].endswith(f"(2): {layer}.mlp.experts.3.up_proj.weight; model.norm.weight")
    assert "misshapen (4)" in lines["misshapen"]
    assert "lm_head.weight is [159, 64], must be [160, 64]" in lines["misshapen"]
    assert f"{transposed[0]} is [32, 224], must be [224, 32]" in lines["misshapen"]
    assert f"{transposed[1]} is [32, 64], must be [64, 32]" in lines["misshapen"]
    assert f"{layer}.input_layernorm.weight is [1, 64], must be [64]" in lines["misshapen"]
    assert f"{layer}.self_attn.o_proj.weight is int32" in lines["not floating point"]
    extra = "(2): model.embed_tokens.weight_scale_inv; model.layers.9.mlp.gate.weight"
    assert lines["unknown to this configuration"].endswith(extra)


@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
def test_fp8_without_scales_or_with_wrong_ones(tmp_path, fp8):
    tensors = quantised(published(GOLDEN / "sparse"), (16, 24), np.random.default_rng(3))
    lacking, wrong, both = (f"model.layers.{n}.self_attn.kv_a_proj_with_mqa.weight" for n in (0, 2, 4))
    del tensors[lacking + "_scale_inv"], tensors[both + "_scale_inv"]
    tensors[wrong + "_scale_inv"] = np.ascontiguousarray(tensors[wrong + "_scale_inv"][:, :2])
    tensors[both] = np.ascontiguousarray(tensors[both][1:])
    message = refusal(write(tmp_path / "model", tensors, fp8_raw((16, 24))), fp8=fp8)
    assert f"missing (2): {lacking}_scale_inv; {both}_scale_inv" in message
    assert f"{wrong}_scale_inv is [3, 2], must be [3, 3]" in message
    assert f"{both} is [47, 64], must be [48, 64]" in message


def test_fp8_where_it_cannot_be(tmp_path):
    tensors = published(GOLDEN / "dense")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(FP8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(FP8)
    message = refusal(write(tmp_path / "model", tensors, raw_of("dense")))
    assert "FP8, but only matrices can be (1): model.norm.weight" in message
    assert "FP8, but the configuration has no quantization_config (1): lm_head.weight" in message


def test_a_long_list_is_cut_and_counted(tmp_path):
    tensors = published(GOLDEN / "sparse")
    for name in layer_of(tensors, 3):
        del tensors[name]
    message = refusal(write(tmp_path / "model", tensors, raw_of("sparse")))
    count = len(layer_of(published(GOLDEN / "sparse"), 3))
    assert f"missing ({count})" in message
    assert message.endswith(f"and {count - 20} more")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_format": "zip"}, "load_format is 'zip'; it must be one of auto, safetensors, orbax, dummy"),
        ({"fp8": "drop"}, "fp8 is 'drop'; it must be one of keep, dequantize"),
        ({"dtype": "float17"}, "dtype is 'float17'; a model runs in float32 or bfloat16"),
        ({"dtype": np.float16}, "dtype is float16; a model runs in float32 or bfloat16"),
    ],
)
def test_unknown_options(options, message):
    load = inspect.unwrap(checkpoint.load)  # as outside of tests, where annotations are not checked
    with pytest.raises(ValueError, match=message):
        load(GOLDEN / "dense", **options)


def test_another_model_type(tmp_path):
    write(tmp_path / "model", {"a": np.ones(1, F32)}, raw_of("dense", model_type="deepseek_v3"))
    with pytest.raises(ConfigError, match="model_type is 'deepseek_v3'"):
        checkpoint.load(tmp_path / "model")


def test_no_configuration_and_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        checkpoint.load(tmp_path)
    shutil.copy(GOLDEN / "dense" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        checkpoint.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no glmjax\.json"):
        checkpoint.load(tmp_path, load_format="orbax")


def test_a_source_without_norms_is_not_converted(tmp_path):
    write(tmp_path / "model", {"a": np.ones(1, F32)}, raw_of("dense"))
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        checkpoint.convert(tmp_path / "model", tmp_path / "target")
    assert not (tmp_path / "target").exists()


# Sharded, in a process with eight devices; and memory.

SHARDED = """
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmjax.model import checkpoint

SPARSE, DENSE, FP8, SPARSE_ORBAX, FP8_ORBAX = sys.argv[1:]
MESH = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))
AXES = {"E": "a", "N": "b", "F": "b", "V": ("a", "b")}


def place(letters, shape):
    parts = []
    for letter, length in zip(letters, shape, strict=True):
        axis = AXES.get(letter)
        ways = {None: 1, "a": 2, "b": 4}.get(axis, 8)
        parts.append(axis if length % ways == 0 else None)
    return NamedSharding(MESH, PartitionSpec(*parts))


arrays = checkpoint._arrays
jax.config.update("jax_default_prng_impl", "rbg")  # compiles faster
for source, options in (
    (SPARSE, {}),
    (FP8, {}),
    (FP8, {"fp8": "dequantize"}),
    (SPARSE_ORBAX, {}),
    (FP8_ORBAX, {}),
    (SPARSE_ORBAX, {"mtp": False}),
    (DENSE, {"load_format": "dummy"}),
):
    split = arrays(checkpoint.load(source, place=place, **options))
    whole = split if "load_format" in options else arrays(checkpoint.load(source, **options))
    assert whole.keys() == split.keys()
    parts = 0
    for name, array in split.items():
        wanted = np.asarray(whole[name])
        assert array.dtype == wanted.dtype, name
        assert len(array.addressable_shards) == 8, name
        assert np.isfinite(wanted.astype(np.float32)).all(), name
        np.testing.assert_array_equal(np.asarray(array), wanted, err_msg=name)
        for shard in array.addressable_shards:
            assert shard.data.shape == array.sharding.shard_shape(array.shape), name
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(array)[shard.index], err_msg=name)
        parts += array.addressable_shards[0].data.size < array.size
    for name, share in (("attention.q_b_LNYQ", 4), ("attention.o_LDNO", 4), ("experts.down_LEDF", 8), ("embed_VD", 8)):
        assert name not in split or split[name].addressable_shards[0].data.size * share == split[name].size, name
    print(source, options, parts, "split")
"""


@pytest.mark.slow
def test_sharded_weights_are_the_unsharded_ones_and_each_device_holds_its_part(converted, fp8_checkpoints):
    sources = [GOLDEN / name for name in ("sparse", "dense")]
    sources += [fp8_checkpoints[16, 24][0], converted / "sparse", converted / "fp8"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SHARDED, *map(str, sources)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("split") == 7


@pytest.mark.slow
def test_loading_takes_no_more_memory_than_the_weights_and_a_fifth():
    command = [sys.executable, "-m", "benchmarks.load_memory", "--gib", "0.3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bf16" in done.stdout


def test_a_weight_on_a_cpu_is_the_array_it_was_copied_into():
    """Aligned to 64 bytes, so that the device takes it over: what keeps loading within the weights' own memory."""
    from glmjax.model.assemble import aligned

    array = aligned([3, 5], np.float32)
    assert array.ctypes.data % 64 == 0
    array[...] = 1
    taken = jax.make_array_from_callback((3, 5), jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda _: array)
    assert taken.unsafe_buffer_pointer() == array.ctypes.data
