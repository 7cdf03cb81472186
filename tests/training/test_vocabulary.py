"""The tokenizer loses nothing, knows GLM's special tokens, and is the one that the project ships."""

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from glmjax.training import vocabulary
from glmjax.training.corpus import Document

unhurried = hypothesis.settings(deadline=None)  # the machine may be busy

NANO = Path(__file__).parents[2] / "glmjax" / "nano"
TEXTS = ("def f(x):\n    return x + 12345\n\n\nclass C:\n    def f(self):\n        return self.name\n",) * 3


@pytest.fixture(scope="module")
def nano():
    return Tokenizer.from_file(str(NANO / "tokenizer.json"))


@pytest.fixture(scope="module")
def nano_config():
    return json.loads((NANO / "tokenizer_config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny():
    return vocabulary.train(TEXTS, vocab_size=300)


def pieces(tokenizer, text):
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode(text).ids]


@unhurried
@hypothesis.given(st.text(), st.sampled_from(["", *vocabulary.SPECIAL_TOKENS]), st.text())
def test_any_text_survives_the_round_trip(nano, before, special, after):
    text = before + special + after
    assert nano.decode(nano.encode(text).ids, skip_special_tokens=False) == text


@unhurried
@hypothesis.given(st.text("ab1 \t\r\n_.('#é", max_size=40))
def test_code_like_text_survives_the_round_trip(nano, tiny, text):
    for tokenizer in (nano, tiny):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_special_tokens_are_the_last_ids_in_order(nano, tiny):
    for tokenizer, size in ((nano, 4096), (tiny, 300)):
        assert tokenizer.get_vocab_size() == size
        ids = [tokenizer.token_to_id(token) for token in vocabulary.SPECIAL_TOKENS]
        assert ids == list(range(size - len(vocabulary.SPECIAL_TOKENS), size))


def test_a_special_token_is_one_token_wherever_it_stands(nano):
    for token in vocabulary.SPECIAL_TOKENS:
        assert pieces(nano, f"x{token} y") == ["x", token, " y"]


def test_decoding_skips_control_tokens_and_keeps_markup(nano):
    everything = "".join(vocabulary.SPECIAL_TOKENS)
    assert nano.decode(nano.encode(everything).ids) == "".join(vocabulary.MARKUP_TOKENS)


def test_code_is_split_at_its_own_joints(nano):
    text = "):\n\n        return self.name_1234  # 'text'\n"
    split = [text[start:end] for _, (start, end) in nano.pre_tokenizer.pre_tokenize_str(text)]
    expected = ["):\n\n", "        ", "return", " self", ".name", "_", "123", "4", "  ", "#", " '", "text", "'\n"]
    assert split == expected


def test_an_indentation_is_one_token(nano):
    for depth in (1, 2, 3, 4, 5):
        assert pieces(nano, "\n" + "    " * depth + "return")[1:] == ["    " * depth, "return"]


def test_a_prompt_that_ends_with_a_line_or_an_indentation_is_a_prefix_of_the_file(nano):
    text = "class C:\n    def f(self):\n        if self.x:\n\n            return 1\n"
    whole = nano.encode(text).ids
    for prompt in ("class C:\n", "class C:\n    ", "class C:\n    def f(self):\n        "):
        ids = nano.encode(prompt).ids
        assert whole[: len(ids)] == ids


def test_training_is_deterministic(tiny):
    assert vocabulary.train(TEXTS, vocab_size=300).to_str() == tiny.to_str()


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match="need at least 276"):
        vocabulary.train(TEXTS, vocab_size=275)


def test_written_files_load_again_and_are_small(tiny, tmp_path):
    vocabulary.write(tiny, tmp_path / "new")
    again = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert again.encode(TEXTS[0]).ids == tiny.encode(TEXTS[0]).ids
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == vocabulary.tokenizer_config(tiny)
    assert sum(file.stat().st_size for file in NANO.glob("tokenizer*.json")) < 250_000


def test_the_shipped_configuration_is_of_the_shipped_tokenizer(nano, nano_config):
    assert nano_config == vocabulary.tokenizer_config(nano)
    assert nano_config["eos_token"] == "<|endoftext|>"
    assert nano.token_to_id(nano_config["pad_token"]) == 4076


def test_the_chat_template_writes_glms_layout(nano, nano_config):
    template = ImmutableSandboxedEnvironment().from_string(nano_config["chat_template"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Sort "}, {"type": "text", "text": "a list.\n"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "3"},
    ]
    text = template.render(messages=messages, add_generation_prompt=True)
    assert text == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nSort a list.\n<|assistant|>\n"
        "<|observation|>\n<tool_response>3</tool_response><|assistant|>\n"
    )
    prompt = template.render(messages=messages[:1], add_generation_prompt=False)
    assert pieces(nano, prompt)[:4] == ["[gMASK]", "<sop>", "<|system|>", "\n"]


def test_bytes_per_token_counts_utf8(tiny):
    document = Document("a.py", "é\n")
    assert vocabulary.bytes_per_token(tiny, [document]) == 3 / len(tiny.encode("é\n").ids)
