"""A checkpoint small enough to measure in a test: random weights, an MTP layer, and a vocabulary of characters."""

import json
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

TINY = json.loads((Path(__file__).parents[1] / "tiny.json").read_text())
RAW = TINY | {"vocab_size": 104, "max_position_embeddings": 512, "eos_token_id": [1]}  # the last of them are padding


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
