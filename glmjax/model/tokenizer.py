"""Text to token ids and back: a thin layer over the `tokenizers` library, for byte-level vocabularies.

A token is a string of *bytes*, so a character may be spread over several tokens, and a model may generate bytes that are
no UTF-8 at all. `Tokenizer.decode` shows these as U+FFFD; `Detokenizer` emits exactly the same text, piece by piece.
"""

import copy
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel, DecodeStream

_TAIL = 16  # tokens, each a byte or more, that `Detokenizer` holds on to where text cannot be cut


class Tokenizer:
    """A checkpoint's vocabulary. Safe to share between threads; every stream has its own `Detokenizer`.

    Attributes:
        raw: the `tokenizers.Tokenizer` below, for libraries that need it. Owned by this object, not to be changed;
            truncation and padding, which some tokenizer.json files switch on, are off.
        special_tokens: named special tokens of tokenizer_config.json, such as {"eos_token": "<|endoftext|>"}.
        vocab_size: one more than the largest token id. Embeddings are often padded beyond it: ids from there on have no
            text, must not be sampled, and are refused here.
    """

    def __init__(self, raw: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None):
        if not isinstance(raw.decoder, ByteLevel):
            raise ValueError(
                f"the decoder is {type(raw.decoder).__name__}, but only ByteLevel streams exactly; use such a tokenizer"
            )
        raw.no_truncation()
        raw.no_padding()
        raw.encode_special_tokens = False
        self.raw, self.special_tokens = raw, dict(special_tokens or {})
        self.vocab_size = max(raw.get_vocab(with_added_tokens=True).values()) + 1
        added = raw.get_added_tokens_decoder()
        self._skipped_ids = frozenset(token for token, text in added.items() if text.special)
        self._control_ids = frozenset(token for token, text in added.items() if not text.content.isspace())

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read tokenizer.json and, where it is there, tokenizer_config.json of a checkpoint directory.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: a file is not what its name says, or the vocabulary is not byte-level.
        """
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {file.parent.absolute()}; copy the model's own there")
        try:
            raw = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ValueError(f"{file} is not a tokenizer: {error}; fetch it again") from error
        return cls(raw, named_special_tokens(read_json(file.with_name("tokenizer_config.json"))))

    def encode(self, text: str, add_special_tokens: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any text without lone surrogates.
            add_special_tokens: add what the tokenizer's post-processor puts around a text. Chat templates write
                `[gMASK]<sop>` themselves, so this is off by default.
            parse_special: `<|user|>` becomes the control token of that name, which chat templates rely on. With False
                all of `text` is plain and no added token comes out of it, so that users cannot smuggle any: neither the
                special ones nor those like `<think>`, which vocabularies often do not mark as special (and which the
                library's own switch, `encode_special_tokens`, would therefore still parse).

        Raises:
            ValueError: `text` has a lone surrogate, or cannot be encoded without a control token.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}; replace it"
            ) from None
        if parse_special:
            return self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        encoding = self._plain.encode(text, add_special_tokens=False)
        if smuggled := self._control_ids.intersection(encoding.ids):
            raise ValueError(
                f"merges make control tokens {sorted(smuggled)} of plain text; take them out of tokenizer.json"
            )
        return self.raw.post_process(encoding, add_special_tokens=add_special_tokens).ids

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that knows no control tokens: all added tokens made special, and special tokens read as text."""
        plain = copy.deepcopy(self.raw)
        plain.add_special_tokens(list(plain.get_added_tokens_decoder().values()))
        plain.encode_special_tokens = True
        return plain

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids that the vocabulary leaves out become nothing.

        Raises:
            ValueError: an id is outside 0 … vocab_size − 1.
        """
        for token in ids:
            self._check(token)
        return self.raw.decode(ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def longest(self) -> int:
        """Of all tokens, the most characters that one stands for, or more: no text of n times as many fits n tokens."""
        return max(map(len, self.raw.get_vocab()), default=1)

    def token_id(self, text: str) -> int | None:
        """The id of the token written exactly `text` (`"<|user|>"`), or None."""
        return self.raw.token_to_id(text)

    def detokenizer(self, skip_special_tokens: bool = True) -> "Detokenizer":
        """A new stream of token ids to text."""
        return Detokenizer(self, skip_special_tokens)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            limit = self.vocab_size - 1
            raise ValueError(f"token id {token} is outside the vocabulary 0 … {limit}; mask the logits beyond it")


class Detokenizer:
    """Text of one stream of token ids, in pieces that never end within a character.

    The pieces and `flush()` joined are `Tokenizer.decode` of all ids, whatever they are. `DecodeStream` keeps back text
    that ends in U+FFFD, since that may be half a character. In invalid bytes, or where every token straddles two
    characters, it never stops and decodes all of it for each token; what is certain is therefore released every 16.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._raw, self._skip = tokenizer, tokenizer.raw, skip_special_tokens
        self._restart([], emitted=0)

    def push(self, token: int) -> str:
        """Add one id; the text that is now certain, often "" and sometimes several characters.

        Raises:
            ValueError: the id is outside 0 … vocab_size − 1. The stream is as before.
        """
        self._tokenizer._check(token)
        if (self._skip and token in self._tokenizer._skipped_ids) or not self._raw.id_to_token(token):
            return ""  # no bytes
        self._held.append(token)
        text = self._stream.step(self._raw, token)
        if text is None:
            return self._release() if len(self._held) == 2 * _TAIL else ""
        piece = text[self._emitted :]
        self._held, self._emitted = [], 0
        return piece

    def flush(self) -> str:
        """The text still held back; an unfinished character comes out as U+FFFD. The stream starts afresh."""
        rest = self._decode(self._held)[self._emitted :]
        self._restart([], emitted=0)
        return rest

    def _release(self) -> str:
        """Hold only the last tokens, and emit the text that they do not determine.

        UTF-8 resynchronises: decoded alone, the last tokens may begin with up to three orphaned bytes, one U+FFFD each;
        from the fourth character on (16 bytes have one) theirs is the end of the whole text, and stays.
        """
        tail = self._held[-_TAIL:]
        kept = len(self._decode(tail)) - 3
        piece = self._decode(self._held)[self._emitted : -kept]
        self._restart(tail, emitted=3)
        return piece

    def _restart(self, held: list[int], emitted: int) -> None:
        self._held, self._emitted = held, emitted  # tokens with text to come, and its first characters that are out
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        if held:
            self._stream.step(self._raw, held)

    def _decode(self, ids: list[int]) -> str:
        return self._raw.decode(ids, skip_special_tokens=self._skip)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, {} where there is no such file; ValueError if it holds anything else."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON object: {error}; fetch it again") from error
    return value


def named_special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Entries such as eos_token of a tokenizer_config.json, written as a string or as {"content": string}."""
    named = {name: value for name, value in tokenizer_config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
