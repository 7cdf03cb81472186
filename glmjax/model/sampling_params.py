"""What a user may ask for one sequence, and the checks that it can be done. Without JAX: clients ask, too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

MAX_LOGPROBS = 20
"""Most alternatives that may be asked for at each position (OpenAI's and vLLM's limit)."""

_LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)
"""The smallest normal number."""


class _Range(NamedTuple):
    """Closed range of a numeric field, and what to do outside it."""

    low: float
    high: float
    remedy: str


_RANGES: dict[str, _Range] = {
    "temperature": _Range(0.0, _LARGEST, "use 0 for greedy decoding, 1 for the model's own distribution"),
    "top_k": _Range(-1, 2**31 - 1, "use 0 or -1 to consider every token"),
    "top_p": _Range(SMALLEST, 1.0, "use 1 to turn it off, temperature 0 for greedy decoding"),
    "min_p": _Range(0.0, 1.0, "use 0 to turn it off"),
    "repetition_penalty": _Range(SMALLEST, _LARGEST, "use 1 to turn it off, more than 1 to discourage repetition"),
    "frequency_penalty": _Range(-2.0, 2.0, "use 0 to turn it off"),
    "presence_penalty": _Range(-2.0, 2.0, "use 0 to turn it off"),
    "min_new_tokens": _Range(0, 2**31 - 1, "use 0 to let it end at once"),
    "max_new_tokens": _Range(1, 2**31 - 1, "use None to generate to the end of the context"),
    "seed": _Range(0, 2**32 - 1, "use None for a random one"),
    "logprobs": _Range(0, MAX_LOGPROBS, "use None for no logprobs, 0 for those of the emitted tokens alone"),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS, "use None for no logprobs, 0 for those of the prompt's tokens alone"),
}
_OPTIONAL = ("max_new_tokens", "seed", "logprobs", "prompt_logprobs")
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice", "structural_tag")


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled and when it ends. Ranges are those of vLLM; `validate` checks them.

    The order in which the rules apply to the logits is in `glmjax.model.sampling.process`.

    Attributes:
      max_new_tokens: Most tokens to generate; None goes to the end of the context.
      min_new_tokens: Before so many tokens no token that ends the sequence is drawn, unless a grammar allows no other, and
        stop strings are not looked for.
      temperature: Logits are divided by it; 0 is greedy (a value below float32's smallest normal number counts as 0).
      top_k: Keep the k most likely tokens; 0 or -1 is off, more than the vocabulary keeps all.
      top_p: Keep the smallest set of most likely tokens whose mass reaches it; 1 is off.
      min_p: Keep the tokens at least this likely relative to the most likely one; 0 is off.
      repetition_penalty: Divides positive logits of tokens seen in prompt or output and multiplies negative; 1 is off.
      frequency_penalty: Subtracted once for every occurrence in the output.
      presence_penalty: Subtracted once from tokens that occur in the output.
      logit_bias: Added to the logits of these token ids.
      seed: Fixes the output; None leaves the choice to the caller, who must set one before sampling starts.
      logprobs: Top alternatives reported at each position; 0 reports the emitted token's only, None nothing.
      prompt_logprobs: The same at each token of the prompt but the first, all of which is read then, whatever is cached.
      stop: Strings that end the sequence where they appear in the text.
      stop_token_ids: Token ids that end it, besides the model's own.
      ignore_eos: Go on after the model's end-of-sequence tokens.
      include_stop_str_in_output: Leave the stop string at the end of the text.
      skip_special_tokens: Leave special tokens' names out of the text, so that no stop string finds them.
      json_schema: Write JSON that this schema, a mapping or its text, describes. Values are set apart as by Python's
        `json.dumps`, unless the schema has an "x-guidance" of its own: {"whitespace_flexible": true} allows any space.
      regex: Write text that all of this regular expression matches.
      grammar: Write text of this grammar, in Lark's notation or as EBNF (GBNF).
      choice: Write one of these texts.
      structural_tag: Write what one likes in some places and follow a form in others: JSON of XGrammar's "format", or of
        "structures", each with "begin", "schema" and "end", and of "triggers", with one of which every "begin" begins (vLLM's
        and SGLang's). Tools' arguments may have the style "glm_xml".
      grammar_from_first_token: Follow the grammar in the thinking block, too, if the prompt ends inside one; otherwise it
        begins behind that.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    frequency_penalty: float | int = 0.0
    presence_penalty: float | int = 0.0
    logit_bias: Mapping[int, float | int] = field(default_factory=dict, hash=False)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    json_schema: Mapping[str, Any] | str | None = field(default=None, hash=False)
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None
    structural_tag: str | None = None
    grammar_from_first_token: bool = False

    @property
    def constraint(self) -> str | None:
        """Which of the fields that constrain the text is set."""
        return next((name for name in _CONSTRAINTS if getattr(self, name) is not None), None)

    def validate(self, vocab: int) -> None:
        """Check every field against its range and a vocabulary of `vocab` tokens.

        Raises:
          ValueError: names the field, its value, the limit and what to set instead.
        """
        for name, (low, high, remedy) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not low <= value <= high:  # false for NaN too
                raise ValueError(f"{name} {value} is outside [{low:.10g}, {high:.10g}]; {remedy}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab:
                raise ValueError(
                    f"{name} {getattr(self, name)} exceeds the vocabulary of {vocab} tokens; ask for at most {vocab}"
                )
        for token, bias in self.logit_bias.items():
            _check_token("logit_bias", token, vocab)
            if not -_LARGEST <= bias <= _LARGEST:
                raise ValueError(
                    f"logit_bias {bias} of token {token} is outside [{-_LARGEST:.10g}, {_LARGEST:.10g}]; "
                    "use -100 to all but ban a token, 100 to all but force it"
                )
        for token in self.stop_token_ids:
            _check_token("stop_token_ids", token, vocab)
        if isinstance(self.stop, str):
            raise ValueError(f"stop {self.stop!r} is a single string, not a tuple of them; use ({self.stop!r},)")
        if "" in self.stop:
            raise ValueError(f"stop {self.stop!r} has an empty string, which matches everywhere; leave it out")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}; lower it"
            )
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; a text follows one of them")


def _check_token(name: str, token: int, vocab: int) -> None:
    if not 0 <= token < vocab:
        raise ValueError(
            f"{name} has token id {token}, outside [0, {vocab - 1}] of this vocabulary; "
            "leave it out, or encode the text with this model's tokenizer"
        )
