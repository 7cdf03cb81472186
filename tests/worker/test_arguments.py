"""Flags in SGLang's spellings become the engine's configuration, or are refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from glmjax import serve
from glmjax.nano import NANO
from glmjax.serving.config import EngineConfig
from glmjax.serving.pages import PagedCache
from glmjax.worker import memory
from glmjax.worker.arguments import Arguments
from tests.serving.test_grammar import glm


def test_defaults_are_the_engines():
    asked = Arguments().engine(glm(), on_gpu=False)
    assert asked == EngineConfig(grammars=True, recorded_dispatches=0)


def test_flags_arrive():
    arguments = Arguments(
        context_length=128,
        max_running_requests=3,
        max_total_tokens=1000,
        page_size=32,
        chunked_prefill_size=64,
        max_queued_requests=7,
        speculative_num_draft_tokens=2,
        disable_grammars=True,
        hicache_size=0.5,
    )
    asked = arguments.engine(glm(), on_gpu=False)
    assert (asked.max_model_len, asked.max_num_seqs, asked.pages, asked.page_size) == (128, 3, 31, 32)
    assert (asked.chunk_tokens, asked.max_queued, asked.num_draft) == (64, 7, 2)
    assert (asked.grammars, asked.offload_bytes) == (False, 500_000_000)


def test_what_is_switched_off_and_on():
    asked = Arguments(disable_radix_cache=True).engine(glm(), on_gpu=False)
    assert not asked.prefix_cache
    assert asked.recorded_dispatches == 0
    assert Arguments(flight_recorder=Path("/flights")).engine(glm(), on_gpu=False).recorded_dispatches > 0


def test_the_cache_takes_what_the_model_leaves_of_the_memory(monkeypatch):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(glm().weights))
    monkeypatch.setattr(memory, "device_bytes", lambda: 2 * (weights + 40 * memory.page_bytes(glm(), 8) + 1))
    half = Arguments(mem_fraction_static=0.5, page_size=8, chunked_prefill_size=8, context_length=8 * 40)
    assert half.engine(glm(), on_gpu=False).pages == 40
    with pytest.raises(ValueError, match=r"--context-length 321 is more .* the longest that fits is 320"):
        dataclasses.replace(half, context_length=321).engine(glm(), on_gpu=False)
    with pytest.raises(ValueError, match="the model takes"):
        dataclasses.replace(half, mem_fraction_static=0.1).engine(glm(), on_gpu=False)
    on_gpu = dataclasses.replace(half, mem_fraction_static=None)
    assert on_gpu.engine(glm(), on_gpu=True).pages > 40  # 0.85 of it
    assert on_gpu.engine(glm(), on_gpu=False).pages is None


def test_a_page_takes_what_a_cache_takes_for_each():
    cache = PagedCache.create(glm().config, 3, 8, jnp.float32, tail_dtype=jnp.float32, mtp=True)
    scalars = 8 + 4  # of a page: version and readiness; of the cache: the epoch
    assert memory.page_bytes(glm(), 8) == cache.page_bytes + scalars


def test_the_checkpoints_own_sampling_is_told(tmp_path):
    assert Arguments().card().default_sampling_params_json == ""
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "eos_token_id": [1, 2]}')
    told = json.loads(Arguments(model_path=tmp_path).card().default_sampling_params_json)
    assert told == {"temperature": 0.6, "top_p": 0.95}


def test_drafts_are_made_where_they_pay():
    assert Arguments().engine(glm(), on_gpu=True).num_draft == 3
    without = dataclasses.replace(Arguments(), speculative_num_draft_tokens=0)
    assert without.engine(glm(), on_gpu=True).num_draft == 0


def test_the_model_goes_by_the_name_of_its_folder_or_a_given_one():
    card = Arguments().card()
    assert (card.model_path, card.tokenizer_path, card.served_model_name) == (str(NANO), str(NANO), "nano")
    named = Arguments(model_path=Path("/models/x"), tokenizer_path=Path("/models/y"), served_model_name="glm").card()
    assert (named.model_path, named.tokenizer_path, named.served_model_name) == ("/models/x", "/models/y", "glm")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--port", "70000"), "--port 70000 is outside 0..65535"),
        (("--drain-seconds", "-1"), "must not be negative"),
        (("--max-total-tokens", "10"), "less than a page of 64"),
        (("--mem-fraction-static", "1.5"), "--mem-fraction-static 1.5 is outside 0..1"),
        (("--mem-fraction-static", "0.5", "--max-total-tokens", "640"), "give one"),
        (("--replicas", "0"), "--replicas 0 must be at least 1"),
        (("--gateway", "--ssl-ca-certs", "ca.pem"), "asks nobody for a certificate"),
        (("--model-path", "/nowhere", "--port", "0"), "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(flags, complaint, capsys):
    try:
        status = serve.main(flags)
    except SystemExit as end:  # of what can be seen in the flags themselves
        status = end.code
    assert status == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        serve.main(["--help"])
    assert end.value.code == 0
    text = "".join(capsys.readouterr().out.replace("│", "").split())  # whatever its lines are broken at
    explained = dict(re.findall(r"^        (\w+): (.*(?:\n {12}.*)*)", Arguments.__doc__, re.MULTILINE))
    assert {*explained} == {field.name for field in dataclasses.fields(Arguments)}
    for name, words in explained.items():
        assert f"--{name.replace('_', '-')}" in text
        assert "".join(words.split()) in text
