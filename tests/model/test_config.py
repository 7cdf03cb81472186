"""Reading ``config.json``: how absent fields are filled, and what is refused with the field, its value and the rule."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.model.config import ConfigError, Fp8Format, GlmConfig

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {
    name: json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("glm-5", "glm-5.1", "glm-5.2", "nano")
}

TINY = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
"""Every field that has no default and nothing else."""

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def read(**changes) -> GlmConfig:
    return GlmConfig.from_dict({**TINY, **changes})


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    return str(caught.value)


# What the published files come to.


@pytest.mark.parametrize("name", ["glm-5", "glm-5.1"])
def test_glm_5_and_5_1(name):
    config = GlmConfig.from_dir(CONFIGS / f"{name}.json")
    assert config.layers == (("dense", "full"),) * 3 + (("sparse", "full"),) * 75
    assert (config.qk_head_dim, config.cache_row_dim, config.softmax_scale) == (256, 576, 1 / 16)
    assert config.rope_theta == 1e6
    assert config.max_position_embeddings == 202752
    assert config.eos_token_id == (154820, 154827, 154829)
    assert config.latent_norm_eps == 1e-6 != config.rms_norm_eps
    assert not config.index_share_for_mtp_iteration
    assert config.quantization is None


def test_glm_5_2_shares_three_of_four_indexers():
    config = GlmConfig.from_dir(CONFIGS / "glm-5.2.json")
    full = [layer for layer, kind in enumerate(config.indexer_types) if kind == "full"]
    assert full == [0, 1, 2, *range(6, 75, 4)]
    assert (len(full), config.indexer_types.count("shared")) == (21, 57)
    assert config.rope_theta == 8e6
    assert config.max_position_embeddings == 1048576
    assert config.index_share_for_mtp_iteration


def test_glm_5_2_differs_from_5_1_only_in_context_and_sharing():
    old, new = (dataclasses.asdict(GlmConfig.from_dict(PUBLISHED[name])) for name in ("glm-5.1", "glm-5.2"))
    assert {field for field in old if old[field] != new[field]} == {
        "indexer_types",
        "index_share_for_mtp_iteration",
        "rope_theta",
        "max_position_embeddings",
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_hashable_and_survives_json(name):
    config = GlmConfig.from_dict(PUBLISHED[name])
    again = GlmConfig.from_dict(json.loads(json.dumps(PUBLISHED[name])))
    assert config == again
    assert hash(config) == hash(again)
    assert config.num_nextn_predict_layers == 1


# How absent fields are filled.


def test_the_fields_without_default_suffice():
    config = read()
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 1)
    assert (config.num_nextn_predict_layers, config.eos_token_id, config.pad_token_id) == (0, (), None)
    assert config.layers == (("dense", "full"),) * 3


@pytest.mark.parametrize(
    ("given", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 500}, 500.0),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 500}, 1e6),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500}, 500.0),
        ({"rope_parameters": {"rope_type": "default"}}, 10000.0),
        ({"rope_parameters": None, "rope_scaling": None, "rope_theta": None}, 10000.0),
        ({"rope_scaling": {"type": "default", "rope_theta": 7}}, 7.0),
    ],
)
def test_rope_theta_comes_from_rope_parameters_then_from_its_own_field_then_is_10000(given, theta):
    assert read(**given).rope_theta == theta
    assert isinstance(read(**given).rope_theta, float)


@pytest.mark.parametrize(
    ("given", "letters"),
    [
        ({}, "FFF"),
        ({"indexer_types": ["full", "shared", "full"]}, "FSF"),
        ({"index_topk_pattern": "FSS"}, "FSS"),
        ({"index_topk_pattern": "FSS", "index_topk_freq": 1}, "FSS"),
        ({"indexer_types": ["full", "full", "shared"], "index_topk_pattern": "FSS"}, "FFS"),
        ({"indexer_types": None, "index_topk_pattern": None, "index_topk_freq": None}, "FFF"),
        ({"num_hidden_layers": 8, "index_topk_freq": 2}, "FFSFSFSF"),
        ({"num_hidden_layers": 8, "index_topk_freq": 3}, "FFSSFSSF"),
        ({"num_hidden_layers": 8, "index_topk_freq": 4, "index_skip_topk_offset": 1}, "FSSSFSSS"),
        ({"num_hidden_layers": 8, "index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSSFS"),
        ({"num_hidden_layers": 8, "index_topk_freq": 4, "index_skip_topk_offset": 9}, "FFFFFFFF"),
    ],
)
def test_indexer_types_come_from_the_list_then_the_pattern_then_frequency_and_offset(given, letters):
    assert "".join(kind[0].upper() for kind in read(**given).indexer_types) == letters


@pytest.mark.parametrize(
    ("given", "letters"),
    [
        ({}, "DDD"),
        ({"num_hidden_layers": 5}, "DDDSS"),
        ({"first_k_dense_replace": 0}, "SSS"),
        ({"first_k_dense_replace": 1}, "DSS"),
        ({"first_k_dense_replace": 9}, "DDD"),
        ({"first_k_dense_replace": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}, "SDS"),
    ],
)
def test_mlp_types_come_from_the_list_then_from_first_k_dense_replace(given, letters):
    assert "".join(kind[0].upper() for kind in read(**given).mlp_layer_types) == letters


@pytest.mark.parametrize(
    ("given", "ids"), [({}, ()), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 0, 31]}, (5, 0, 31))]
)
def test_eos_is_one_id_or_a_list_of_them(given, ids):
    assert read(**given).eos_token_id == ids


@pytest.mark.parametrize(
    "ignored",
    [
        {"head_dim": 64},
        {"head_dim": 192},
        {"indexer_rope_interleave": False},
        {"transformers_version": "5.4.0"},
        {"quantization": "the name of our own field, but no key of config.json"},
    ],
)
def test_what_is_unreliable_or_unknown_is_ignored(ignored):
    assert read(**ignored) == read()


def test_an_fp8_checkpoint_names_its_blocks():
    assert read(quantization_config=FP8).quantization == Fp8Format((128, 128))
    assert read(quantization_config={**FP8, "weight_block_size": [64, 32]}).quantization == Fp8Format((64, 32))
    assert read(quantization_config=None).quantization is None


def test_whole_numbers_do_for_floats():
    assert read(routed_scaling_factor=2).routed_scaling_factor == 2.0


# What is refused. Each case: what is changed, and what the message must hold: field, value, rule.


@pytest.mark.parametrize("field", sorted(set(TINY) - {"model_type"}))
def test_a_missing_field_is_named_and_null_is_missing(field):
    for raw in ({key: value for key, value in TINY.items() if key != field}, {**TINY, field: None}):
        with pytest.raises(ConfigError, match=f"^{field} is missing from the configuration"):
            GlmConfig.from_dict(raw)


@pytest.mark.parametrize("field", sorted(set(TINY) - {"model_type"}))
@pytest.mark.parametrize("value", ["16", 16.0, True, [16]], ids=repr)
def test_an_integer_must_be_one(field, value):
    assert refusal(**{field: value}) == f"{field} is {value!r}; it must be an integer"


@pytest.mark.parametrize("field", sorted(set(TINY) - {"model_type"}))
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_must_be_positive(field, value):
    assert refusal(**{field: value}) == f"{field} is {value}; it must be positive and finite"


@pytest.mark.parametrize("field", ["rms_norm_eps", "latent_norm_eps", "rope_theta", "routed_scaling_factor"])
@pytest.mark.parametrize("value", ["1e-5", True, [1.0], 0.0, -1.0, math.nan, math.inf], ids=repr)
def test_a_number_must_be_positive_and_finite(field, value):
    message = refusal(**{field: value})
    assert message.startswith(f"{field} is {value!r}; it must be ")
    assert message.endswith("positive and finite" if isinstance(value, float) else "a number")


@pytest.mark.parametrize("field", ["norm_topk_prob", "attention_bias", "tie_word_embeddings"])
@pytest.mark.parametrize("value", ["false", 0, 1.0, []], ids=repr)
def test_a_flag_must_be_true_or_false(field, value):
    assert refusal(**{field: value}) == f"{field} is {value!r}; it must be true or false"


@pytest.mark.parametrize(
    ("field", "only"),
    [
        ("hidden_act", "silu"),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("mlp_bias", False),
        ("moe_layer_freq", 1),
        ("rope_interleave", True),
    ],
)
def test_what_only_other_models_do_is_refused(field, only):
    value = (not only) if isinstance(only, bool) else "something else"
    assert refusal(**{field: value}) == f"{field} is {value!r}; only {only!r} is implemented, as GLM-5 uses it"
    assert read(**{field: only}) == read()


@pytest.mark.parametrize("model_type", ["deepseek_v32", "GLM_MOE_DSA", None, 5])
def test_another_model_type_is_refused(model_type):
    assert refusal(model_type=model_type) == f"model_type is {model_type!r}; glmjax serves 'glm_moe_dsa' only"


def test_a_configuration_without_model_type_is_refused():
    with pytest.raises(ConfigError, match="model_type is None"):
        GlmConfig.from_dict({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim is 5; it must be even: rotary pairs"),
        ({"index_head_dim": 2}, "index_head_dim is 2; it must be at least qk_rope_head_dim (4)"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; it must be 0 or 1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; it must be 0 or 1"),
    ],
)
def test_a_size_that_does_not_fit_the_others_is_refused(changes, message):
    assert message in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "n_group is 3; it must divide n_routed_experts (8)"),
        ({"n_group": 8, "topk_group": 8}, "n_group is 8; it leaves one expert a group"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3; it must not exceed n_group (2)"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must not exceed the 8 experts of topk_group groups"),
        (
            {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3; it must not exceed the 2 experts of topk_group groups",
        ),
    ],
)
def test_groups_that_cannot_route_are_refused(changes, message):
    assert message in refusal(**changes)


@pytest.mark.parametrize(("field", "kind"), [("mlp_layer_types", "dense"), ("indexer_types", "full")])
@pytest.mark.parametrize("named", [0, 2, 4])
def test_a_list_of_kinds_must_name_every_layer(field, kind, named):
    kinds = (kind,) * named
    assert refusal(**{field: list(kinds)}) == f"{field} is {kinds}; it must name 3 layers, names {named}"


@pytest.mark.parametrize("field", ["mlp_layer_types", "indexer_types"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fss", "is 'fss'; it must be a list with the kind of every layer"),
        (3, "is 3; it must be a list with the kind of every layer"),
        ({"0": "full"}, "it must be a list with the kind of every layer"),
    ],
)
def test_kinds_must_be_a_list(field, value, message):
    refused = refusal(**{field: value})
    assert refused.startswith(f"{field} is ")
    assert message in refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexer_types": ["full", "half", "full"]}, "indexer_types[1] is 'half'; it must be one of full, shared"),
        ({"indexer_types": ["full", 1, "full"]}, "indexer_types[1] is 1; it must be one of full, shared"),
        ({"indexer_types": ["full", "full", None]}, "indexer_types[2] is None; it must be one of full, shared"),
        ({"mlp_layer_types": ["moe"] * 3}, "mlp_layer_types[0] is 'moe'; it must be one of dense, sparse"),
        ({"indexer_types": ["shared", "full", "full"]}, "indexer_types[0] is 'shared'; it must be full"),
        ({"index_topk_pattern": "SFF"}, "indexer_types[0] is 'shared'; it must be full"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, "indexer_types[0] is 'shared'; it must be full"),
        ({"index_topk_pattern": "FS"}, "index_topk_pattern is 'FS'; it must be a string of 3 letters"),
        ({"index_topk_pattern": "FSX"}, "index_topk_pattern is 'FSX'; it must be a string of 3 letters"),
        ({"index_topk_pattern": ["F", "S", "S"]}, "index_topk_pattern is ['F', 'S', 'S']; it must be a string"),
        ({"index_topk_freq": 0}, "index_topk_freq is 0; it must be positive"),
        ({"index_topk_freq": 2.0}, "index_topk_freq is 2.0; it must be an integer"),
        ({"index_skip_topk_offset": "3"}, "index_skip_topk_offset is '3'; it must be an integer"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1; it must not be negative"),
        ({"first_k_dense_replace": "3"}, "first_k_dense_replace is '3'; it must be an integer"),
    ],
)
def test_layer_kinds_that_cannot_be_are_refused(changes, message):
    assert message in refusal(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rope_parameters.rope_type is 'yarn'; only 'default'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.rope_type is 'yarn'; only 'default'"),
        (
            {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            "rope_scaling.rope_type is 'linear'; only 'default'",
        ),
        ({"rope_parameters": [1e6]}, "rope_parameters is [1000000.0]; it must be an object"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'; it must be a number"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1.0; it must be positive"),
    ],
)
def test_a_rope_that_is_not_implemented_is_refused(changes, message):
    assert message in refusal(**changes)


@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [32, -1])
def test_a_token_beyond_the_vocabulary_is_refused(field, value):
    message = refusal(**{field: value})
    assert message.startswith(f"{field} is ")
    assert str(value) in message
    assert message.endswith("; it must lie in the vocabulary, 0..31")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be an integer"),
        ({"eos_token_id": 1.0}, "eos_token_id is 1.0; it must be an integer"),
        ({"eos_token_id": True}, "eos_token_id is True; it must be an integer"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id[1] is '2'; it must be an integer"),
        ({"eos_token_id": [1, 2.0]}, "eos_token_id[1] is 2.0; it must be an integer"),
        ({"eos_token_id": [1, None]}, "eos_token_id[1] is None; it must be an integer"),
        ({"eos_token_id": [1, 32]}, "eos_token_id is (1, 32); it must lie in the vocabulary, 0..31"),
        ({"pad_token_id": "0"}, "pad_token_id is '0'; it must be an integer"),
    ],
)
def test_a_token_that_is_no_id_is_refused(changes, message):
    assert refusal(**changes) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq', fmt 'e4m3'; fp8 with e4m3 is what can be read"),
        ({"quant_method": None}, "quant_method None, fmt 'e4m3'; fp8 with e4m3 is what can be read"),
        ({"fmt": "e5m2"}, "quant_method 'fp8', fmt 'e5m2'; fp8 with e4m3 is what can be read"),
        ({"weight_block_size": None}, "no weight_block_size; one scale per block is what can be read"),
        ({"weight_block_size": 128}, "weight_block_size is 128; it must be two positive integers"),
        ({"weight_block_size": [128]}, "weight_block_size is [128]; it must be two positive integers"),
        ({"weight_block_size": [128, 128, 1]}, "it must be two positive integers"),
        ({"weight_block_size": [128, 0]}, "it must be two positive integers"),
        ({"weight_block_size": ["128", "128"]}, "it must be two positive integers"),
        ({"weight_block_size": [128.0, 128]}, "it must be two positive integers"),
    ],
)
def test_a_quantisation_that_cannot_be_read_is_refused(changes, message):
    refused = refusal(quantization_config={**FP8, **changes})
    assert refused.startswith("quantization_config")
    assert message in refused


def test_a_quantisation_that_is_no_object_is_refused():
    assert refusal(quantization_config="fp8") == "quantization_config is 'fp8'; it must be an object"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
every_field = sorted(
    {f.name for f in dataclasses.fields(GlmConfig)}
    | {"model_type", "rope_parameters", "rope_scaling", "quantization_config", "first_k_dense_replace"}
    | {"index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "moe_layer_freq", "rope_interleave"}
)


@given(st.dictionaries(st.sampled_from(every_field), json_values, min_size=1, max_size=3))
@settings(deadline=None)
def test_any_json_is_either_read_or_refused_with_a_field_that_was_changed(changes):
    try:
        outcome = repr(hash(read(**changes)))
    except ConfigError as error:
        outcome = str(error)
    derived = ("indexer_types", "mlp_layer_types", "rope_theta", "topk_group")
    assert outcome.lstrip("-").isdigit() or any(field in outcome for field in (*changes, *derived))


# Files.


def test_a_directory_or_the_file_itself_can_be_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert GlmConfig.from_dir(tmp_path) == GlmConfig.from_dir(str(tmp_path / "config.json")) == read()


@pytest.mark.parametrize("name", ["", "absent", "absent.json"])
def test_no_such_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no config.json at {tmp_path}.*; give a checkpoint's directory"):
        GlmConfig.from_dir(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: "),
        (b"{'model_type': 'glm_moe_dsa'}", "is not JSON: "),
        (b"\xff\xfe\x00", "is not JSON: "),
        (b"[1, 2]", "holds a JSON list; a configuration is an object"),
        (b'"glm"', "holds a JSON str; a configuration is an object"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        GlmConfig.from_dir(tmp_path)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
