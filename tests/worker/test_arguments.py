"""Flags in SGLang's spellings become the engine's configuration, or are refused by name."""

import dataclasses
from pathlib import Path

import pytest

from glmjax import serve
from glmjax.nano import NANO
from glmjax.serving.config import EngineConfig
from glmjax.worker.arguments import Arguments
from tests.serving.test_grammar import glm


def test_defaults_are_the_engines():
    asked = Arguments().engine(glm(), on_gpu=False)
    assert asked == EngineConfig(grammars=True, offload_bytes=0)


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
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Arguments):
        assert f"--{field.name.replace('_', '-')}" in text
