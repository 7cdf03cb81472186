"""Grammars: which tokens may come next, by llguidance, whose state is on the host.

A grammar says which texts may be written; a token is allowed where some such text goes on with it, an end-of-turn token
where the text may be over. `Matcher.allowed` gives masks for the device, a bit for each token: what is drawn under them is
distributed as what the model says, given that it is allowed (`glmjax.model.sampling.allow`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from glmjax.model.lark import SPACING, Lark, names_in
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import Stops
from glmjax.model.structural_tag import structural_tag
from glmjax.model.tokenizer import Tokenizer

THOUGHT, THOUGHT_END = "<think>", "</think>"
"""Between which the model thinks."""
MOST_CHARACTERS, MOST_CHOICES = 256 << 10, 10_000
"""Of a grammar: the time that it takes to read grows faster than its size, and cannot be cut short."""
MOST_NAMES = 1000
"""Rules and references of a grammar. They may refer to each other in a chain, which llguidance follows down a stack: one of
thousands would end the process."""


class Grammars:
    """Makes matchers for a model's vocabulary. Any thread may call it.

    Args:
        tokenizer: the model's.
        stops: its end-of-turn tokens.
        vocab: V, the width of the logits.

    Raises:
        ValueError: there is no tokenizer, or no token that ends a turn.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Stops, vocab: int):
        if tokenizer is None:
            raise ValueError("grammars need a tokenizer; this model was loaded without one")
        if not stops.token_ids:
            raise ValueError("grammars need a token that ends a turn; name one as eos_token_id in config.json")
        self._words = words_of(vocab)
        eos = sorted(stops.token_ids)
        vocabulary = _Vocabulary(tokenizer, eos[0], vocab)
        self._special = frozenset(vocabulary.special_token_ids)
        self._vocabulary = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=eos)
        self._thought, self._thought_end = map(tokenizer.token_id, (THOUGHT, THOUGHT_END))

    def matcher(self, params: SamplingParams, prompt: Sequence[int] = ()) -> Matcher | None:
        """Of what a sequence asks for, at its beginning; None where it asks for no grammar.

        Args:
            params: what it asks for.
            prompt: before it. Where it ends in the middle of a thinking block, the grammar begins behind that.

        Raises:
            ValueError: what it asks for is no grammar that can be followed, in llguidance's words.
        """
        if (name := params.constraint) is None:
            return None
        given = getattr(params, name)
        if (size := len(given if isinstance(given, str) else json.dumps(given, default=dict))) > MOST_CHARACTERS:
            raise ValueError(f"{name} has {size} characters; simplify it to at most {MOST_CHARACTERS}")
        if name == "choice" and len(given) > MOST_CHOICES:
            raise ValueError(f"choice has {len(given)} texts; give at most {MOST_CHOICES}, or a regex")
        try:
            text = _text(name, given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not one: {error}") from error
        if (count := names_in(text)) > MOST_NAMES:
            raise ValueError(f"{name} has {count} rules and references; simplify it to at most {MOST_NAMES}")
        if not params.grammar_from_first_token and self._thinking(prompt):
            text = _after_thoughts(text)
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"{name} cannot be followed: {matcher.get_error()}")
        return Matcher(matcher, self._words)

    @property
    def knows_thoughts(self) -> bool:
        """Whether the model has tokens that a thinking block begins and ends with."""
        return self._thought is not None and self._thought_end is not None

    def _thinking(self, prompt: Sequence[int]) -> bool:
        if not self.knows_thoughts:
            return False
        for token in reversed(prompt):
            if token in (self._thought, self._thought_end):
                return token == self._thought
            if token in self._special:  # somebody else's turn before it
                return False
        return False


class Matcher:
    """Where a sequence is in its grammar. One thread at a time.

    Args:
        raw: llguidance's.
        words: W, of a mask.
        length: tokens it has seen.
    """

    def __init__(self, raw: LLMatcher, words: int, length: int = 0):
        self._raw, self._words, self._length = raw, words, length
        self._forced: list[int] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._raw.is_stopped() and not self._raw.is_error()

    @property
    def error(self) -> str:
        """Why the grammar could not be followed any further, or ""."""
        return self._raw.get_error() if self._raw.is_error() else ""

    @property
    def forced(self) -> list[int]:
        """Tokens to which there is no alternative; each is the only one allowed."""
        if self._forced is None:
            self._forced = self._raw.compute_ff_tokens()
        return self._forced

    def push(self, token: int) -> None:
        """Add a token."""
        self._raw.consume_token(token)
        self._length += 1
        self._forced = None

    def allowed(self, chain: Sequence[int] = ()) -> np.ndarray:
        """Which tokens may come now, and after each of a chain of allowed ones: int32 [1 + chain, W].

        Token v is bit v mod 32 of word v // 32. Nothing is allowed after a token that is not.
        """
        allowed_TW = np.zeros((len(chain) + 1, self._words), np.int32)
        seen = 0
        for t, mask_W in enumerate(allowed_TW):
            self._raw.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
            if t == len(chain) or not self._raw.try_consume_tokens([chain[t]]):
                break
            seen += 1
        if seen:
            self._raw.rollback(seen)
        return allowed_TW

    def at(self, length: int) -> Matcher:
        """As it was after so many tokens; a matcher of its own."""
        raw = self._raw.deep_copy()
        if length < self._length:
            raw.rollback(self._length - length)
        return Matcher(raw, self._words, length)


def words_of(vocab: int) -> int:
    """W, words of a mask over so many tokens."""
    return -(-vocab // 32)


def _text(name: str, given: Any) -> str:
    """In llguidance's words."""
    if name == "choice":
        if not given or "" in given:
            raise ValueError(f"{given!r} must be texts that are not empty")
        return grammar_from("choice", json.dumps(given))
    if name == "structural_tag":
        return structural_tag(given)
    if name != "json_schema":
        return grammar_from(name, given)
    schema = given if isinstance(given, Mapping) else json.loads(given)
    if not isinstance(schema, Mapping):
        raise ValueError(f"{given!r} is no JSON object")
    own = "x-guidance" in schema
    return LLMatcher.grammar_from_json_schema(json.dumps(dict(schema)), defaults=None if own else SPACING)


def _after_thoughts(grammar: str) -> str:
    """Free text up to the end of the thinking block, and then what the grammar says."""
    lark = Lark()
    return lark.grammar(f"{lark.until([THOUGHT_END])} {lark.part(grammar)}")


class _Vocabulary:
    """A tokenizer as llguidance takes it: texts may have the tokens in them that are not marked as special.

    Left to itself it takes all tokens for special that look like `<this>`, so that no text could have a `<tool_call>` in it
    that the model would write.

    Args:
        tokenizer: the model's.
        eos: any token that ends a turn.
        vocab: V; ids that are no tokens are never allowed.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos: int, vocab: int):
        self._raw, self.eos_token_id = tokenizer.raw, eos
        known = LLTokenizer(tokenizer.raw.to_str())
        self.tokens = [known.decode_bytes([token]) if token < known.vocab_size else b"" for token in range(vocab)]
        added = tokenizer.raw.get_added_tokens_decoder()
        self.special_token_ids = sorted(token for token, content in added.items() if content.special)

    def __call__(self, text: str) -> list[int]:
        return self._raw.encode(text, add_special_tokens=False).ids
