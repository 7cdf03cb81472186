"""A checkpoint small enough to measure in a test: random weights, an MTP layer, and a vocabulary of characters."""

from pathlib import Path

import jax.numpy as jnp
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from glmjax.glm import GLM, load
from glmjax.model import checkpoint
from glmjax.model.config import GlmConfig
from glmjax.model.transformer import Transformer
from glmjax.model.weights import random_source

RAW = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 104,  # the last of them are padding
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "eos_token_id": [1],
}


def save_tokenizer(directory: Path) -> None:
    """Printable ASCII, a token each."""
    tokens = ["<bos>", "<eos>", "Ġ", "Ċ", *map(chr, range(0x21, 0x7F))]
    raw = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(tokens[:2])
    raw.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(Transformer(GlmConfig.from_dict(RAW), dtype=jnp.float32, rngs=random_source(0)), path, RAW)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def without_mtp(directory, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("without-mtp")
    raw = RAW | {"num_nextn_predict_layers": 0}
    checkpoint.save(checkpoint.load(directory, mtp=False), path, raw)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def glm(directory) -> GLM:
    return load(directory)


@pytest.fixture(scope="session")
def file(tmp_path_factory) -> Path:
    """Code, longer than every context here."""
    path = tmp_path_factory.mktemp("text") / "code.py"
    path.write_text("".join(f"def f{i}(x, y={i * 7}):\n    return x + y * {i}\n\n" for i in range(30)))
    return path
