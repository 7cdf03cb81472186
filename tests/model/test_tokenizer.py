import json
import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from glmjax.model.tokenizer import Tokenizer

SPECIAL = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # not marked as special
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café, Übergröße",
    "日本語の文章",
    "😀😃👍🏽",
    "def f(x): return x",
]

random_text = st.text(st.characters(exclude_categories=["Cs"]))
control_text = st.lists(st.one_of(random_text, st.sampled_from(SPECIAL + ADDED))).map("".join)
token_fractions = st.lists(st.floats(0, 1, exclude_max=True), max_size=40)


def byte_level_bpe() -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    prefix = [(text, bpe.token_to_id(text)) for text in SPECIAL[:2]]
    bpe.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=prefix)
    return bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_bpe(), {"eos_token": "<|endoftext|>"})


# A token is written with one printable character per byte.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
WRITTEN = {byte: chr(byte) if byte in PRINTABLE else chr(256 + OTHERS.index(byte)) for byte in range(256)}


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte, as a model may generate them."""
    return [tokenizer.raw.token_to_id(WRITTEN[byte]) for byte in data]


def tokenizer_of(tokens: list[bytes]) -> Tokenizer:
    """A vocabulary of just these tokens, to decode with."""
    written = dict.fromkeys("".join(WRITTEN[byte] for byte in token) for token in tokens)
    raw = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(written)}, []))
    raw.decoder = decoders.ByteLevel()
    return Tokenizer(raw)


# Reading a checkpoint directory


def test_a_directory_gives_vocabulary_and_named_special_tokens(tmp_path):
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "bos_token": {"content": "[gMASK]", "special": True}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.special_tokens == {"eos_token": "<|endoftext|>", "bos_token": "[gMASK]"}
    assert tokenizer.decode(tokenizer.encode("naïve")) == "naïve"


def test_tokenizer_config_is_optional(tmp_path):
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(str(tmp_path)).special_tokens == {}


def test_a_missing_tokenizer_names_directory_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no tokenizer\.json in {tmp_path}; copy"):
        Tokenizer.from_dir(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_a_broken_tokenizer_config_is_named(tmp_path):
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object: it holds a list"):
        Tokenizer.from_dir(tmp_path)


def test_vocabularies_that_are_not_byte_level_are_refused():
    bpe = byte_level_bpe()
    bpe.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="decoder is Metaspace, but only ByteLevel"):
        Tokenizer(bpe)


def test_truncation_and_padding_of_the_file_are_off():
    bpe = byte_level_bpe()
    bpe.enable_truncation(2)
    bpe.enable_padding(length=100)
    tokenizer = Tokenizer(bpe)
    assert tokenizer.decode(tokenizer.encode("a longer text")) == "a longer text"
    assert len(tokenizer.encode("a")) == 1


def test_vocab_size_is_one_more_than_the_largest_id(tokenizer):
    assert tokenizer.vocab_size == tokenizer.token_id("</tool_call>") + 1


def test_token_id_of_a_text_that_is_no_token_is_none(tokenizer):
    assert tokenizer.token_id("no such token") is None


# Encoding and decoding


@given(text=random_text)
def test_decoding_gives_the_encoded_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_the_prefix_is_added_on_demand_only(tokenizer):
    prefix = [tokenizer.token_id("[gMASK]"), tokenizer.token_id("<sop>")]
    plain = tokenizer.encode("fox")
    for parse_special in (True, False):
        assert tokenizer.encode("fox", parse_special=parse_special) == plain
        assert tokenizer.encode("fox", add_special_tokens=True, parse_special=parse_special) == prefix + plain


@pytest.mark.parametrize("text", SPECIAL + ADDED)
def test_control_text_is_parsed_by_default(tokenizer, text):
    assert tokenizer.encode(text) == [tokenizer.token_id(text)]


@given(text=control_text)
def test_plain_text_cannot_smuggle_control_tokens(tokenizer, text):
    ids = tokenizer.encode(text, parse_special=False)
    assert not set(ids) & {tokenizer.token_id(control) for control in SPECIAL + ADDED}
    assert tokenizer.decode(ids) == text


def test_plain_encoding_leaves_parsing_as_it_was(tokenizer):
    before = tokenizer.encode("<|user|><think>")
    tokenizer.encode("<|user|><think>", parse_special=False)
    assert tokenizer.encode("<|user|><think>") == before


def test_control_tokens_that_merges_produce_are_refused():
    bpe = byte_level_bpe()
    spec = json.loads(bpe.to_str())
    the = spec["model"]["vocab"]["the"]
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": the, "content": "the"})
    spec["added_tokens"].sort(key=lambda added: added["id"])
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ValueError, match=rf"merges make control tokens \[{the}\] of plain text"):
        tokenizer.encode("the fox", parse_special=False)


def test_special_tokens_are_skipped_on_demand(tokenizer):
    ids = tokenizer.encode("<|user|>hi<think>")
    assert tokenizer.decode(ids) == "hi<think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hi<think>"


def test_lone_surrogates_are_refused(tokenizer):
    for parse_special in (True, False):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at position 2"):
            tokenizer.encode("ab\ud83d", parse_special=parse_special)


@pytest.mark.parametrize("offset", [-1, 0, 2**32])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, offset):
    token = -1 if offset < 0 else tokenizer.vocab_size + offset
    message = rf"token id {token} is outside the vocabulary 0 … {tokenizer.vocab_size - 1}"
    with pytest.raises(ValueError, match=message):
        tokenizer.decode([0, token])
    with pytest.raises(ValueError, match=message):
        tokenizer.detokenizer().push(token)


# Streaming


def stream(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(text=control_text, skip=st.booleans())
def test_streamed_text_is_the_decoded_text(tokenizer, text, skip):
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_whole_text_leaves_nothing_to_flush_and_no_piece_has_half_a_character(tokenizer, text):
    *pieces, rest = stream(tokenizer, byte_tokens(tokenizer, text.encode()), True)
    assert rest == ""
    assert "\ufffd" not in "".join(pieces)


@given(fractions=token_fractions, skip=st.booleans())
def test_random_ids_stream_to_the_decoded_text(tokenizer, fractions, skip):
    ids = [int(fraction * tokenizer.vocab_size) for fraction in fractions]
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


# Bytes that begin, continue, and break sequences: incomplete, overlong, surrogate, and beyond U+10FFFF.
hard_bytes = st.lists(st.sampled_from(b"a\x80\xbf\xa0\x9f\x90\xc3\xc0\xe2\xe0\xed\xef\xbd\xf0\xf4\xff"), max_size=40)


@given(data=hard_bytes.map(bytes))
def test_what_is_emitted_holds_whatever_follows(tokenizer, data):
    ids, emitted, detokenizer = byte_tokens(tokenizer, data), "", tokenizer.detokenizer()
    for end, token in enumerate(ids, 1):
        emitted += detokenizer.push(token)
        for future in (b"", b"\x80", b"\x9f\x98\x80", b"\xbd", b"a"):
            assert (data[:end] + future).decode(errors="replace").startswith(emitted)
    assert emitted + detokenizer.flush() == data.decode(errors="replace")


def test_a_character_comes_out_with_its_last_byte(tokenizer):
    assert stream(tokenizer, byte_tokens(tokenizer, "a😀b".encode()), True) == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_is_flushed_as_a_replacement_character(tokenizer):
    assert stream(tokenizer, byte_tokens(tokenizer, b"a\xf0\x9f\x98"), True) == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize("count", [1, 100])
def test_skipped_tokens_inside_a_character_do_not_split_it(tokenizer, count):
    first, second = byte_tokens(tokenizer, "é".encode())
    skipped = [tokenizer.token_id("<sop>")] * count
    assert stream(tokenizer, [first, *skipped, second], True) == ["", *[""] * count, "é", ""]


def test_a_stream_can_be_used_again_after_a_flush(tokenizer):
    detokenizer = tokenizer.detokenizer()
    detokenizer.push(byte_tokens(tokenizer, b"\xc3")[0])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(byte_tokens(tokenizer, b"\xa9")[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_refused_id_leaves_the_stream_as_it_was(tokenizer):
    detokenizer = tokenizer.detokenizer()
    first, second = byte_tokens(tokenizer, "é".encode())
    assert detokenizer.push(first) == ""
    with pytest.raises(ValueError):
        detokenizer.push(tokenizer.vocab_size)
    assert detokenizer.push(second) == "é"


byte_strings = st.lists(st.sampled_from(b"a\x80\xbf\x9f\xc3\xe2\xed\xf0\xff"), min_size=1, max_size=5).map(bytes)


@given(vocabulary=st.lists(byte_strings, min_size=1, max_size=5), data=st.data())
def test_long_streams_of_tokens_that_straddle_characters(vocabulary, data):
    tokenizer = tokenizer_of(vocabulary)
    period = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=8))
    ids = (period * 100)[: data.draw(st.integers(0, 120))]
    pieces = stream(tokenizer, ids, True)
    text = tokenizer.decode(ids)
    assert "".join(pieces) == text
    assert all(text.startswith("".join(pieces[:end])) for end in range(len(pieces)))


# Bytes that are no character, half of one at a time, and the halves of two characters in one token.
ENDLESS = [[b"\x80"], [b"\xff"], [b"\xc3"], [b"\x80\xc3"], [b"\x9f\x98\x80\xf0"], [b"\xbf", b"\xbd\xef"]]


@pytest.mark.parametrize("tokens", ENDLESS)
def test_no_more_than_a_few_tokens_are_ever_held_back(tokens):
    tokenizer = tokenizer_of(tokens)
    ids, emitted = [*range(tokenizer.vocab_size)] * 60, ""
    detokenizer = tokenizer.detokenizer()
    for end, token in enumerate(ids, 1):
        emitted += detokenizer.push(token)
        assert emitted.startswith(tokenizer.decode(ids[: max(0, end - 32)])[:-1])
    assert emitted + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("tokens", ENDLESS[:4])
def test_endless_runs_cost_linear_time(tokens):
    """10,000 tokens take 7 s with a bare DecodeStream."""
    tokenizer = tokenizer_of(tokens)
    detokenizer = tokenizer.detokenizer()
    start = time.process_time()
    emitted = "".join(detokenizer.push(0) for _ in range(10_000))
    assert time.process_time() - start < 3
    assert emitted + detokenizer.flush() == tokenizer.decode([0] * 10_000)


def test_skipped_tokens_are_not_held(tokenizer):
    detokenizer = tokenizer.detokenizer()
    start = time.process_time()
    assert {detokenizer.push(tokenizer.token_id("<sop>")) for _ in range(10_000)} == {""}
    assert time.process_time() - start < 3


def test_ids_that_the_vocabulary_leaves_out_have_no_text():
    raw = tokenizers.Tokenizer(models.BPE({"a": 0, "c": 2}, []))
    raw.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(raw)
    assert tokenizer.vocab_size == 3
    assert tokenizer.decode([0, 1, 2]) == "ac"
    assert stream(tokenizer, [0, 1, 2], True) == ["a", "", "c", ""]
