"""What a user may ask for one sequence, the checks that it can be done, and the arrays a step reads it from.

Letters: B slots, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

MAX_LOGPROBS = 20
"""Most alternatives that may be asked for at each position (OpenAI's and vLLM's limit)."""

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)  # the smallest normal number


class _Range(NamedTuple):
    """Closed range of a numeric field, and what to do outside it."""

    low: float
    high: float
    remedy: str


_RANGES: dict[str, _Range] = {
    "temperature": _Range(0.0, _LARGEST, "use 0 for greedy decoding, 1 for the model's own distribution"),
    "top_k": _Range(-1, 2**31 - 1, "use 0 or -1 to consider every token"),
    "top_p": _Range(_SMALLEST, 1.0, "use 1 to turn it off, temperature 0 for greedy decoding"),
    "min_p": _Range(0.0, 1.0, "use 0 to turn it off"),
    "repetition_penalty": _Range(_SMALLEST, _LARGEST, "use 1 to turn it off, more than 1 to discourage repetition"),
    "frequency_penalty": _Range(-2.0, 2.0, "use 0 to turn it off"),
    "presence_penalty": _Range(-2.0, 2.0, "use 0 to turn it off"),
    "min_new_tokens": _Range(0, 2**31 - 1, "use 0 to let it end at once"),
    "max_new_tokens": _Range(1, 2**31 - 1, "use None to generate to the end of the context"),
    "seed": _Range(0, 2**32 - 1, "use None for a random one"),
    "logprobs": _Range(0, MAX_LOGPROBS, "use None for no logprobs, 0 for those of the emitted tokens alone"),
}
_OPTIONAL = ("max_new_tokens", "seed", "logprobs")
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
      stop: Strings that end the sequence where they appear in the text.
      stop_token_ids: Token ids that end it, besides the model's own.
      ignore_eos: Go on after the model's end-of-sequence tokens.
      include_stop_str_in_output: Leave the stop string at the end of the text.
      json_schema: Write JSON that this schema, a mapping or its text, describes. Values are set apart as by Python's
        `json.dumps`, unless the schema has an "x-guidance" of its own: {"whitespace_flexible": true} allows any space.
      regex: Write text that all of this regular expression matches.
      grammar: Write text of this grammar, in Lark's notation or as EBNF (GBNF).
      choice: Write one of these texts.
      structural_tag: Write what one likes, but where a trigger appears, go on as its tag says: JSON of "structures", each with
        "begin", "schema" and "end", and of "triggers", with one of which every "begin" begins (vLLM's and SGLang's).
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
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    json_schema: Mapping[str, Any] | str | None = field(default=None, hash=False)
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None
    structural_tag: str | None = None

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
        if self.logprobs is not None and self.logprobs > vocab:
            raise ValueError(
                f"logprobs {self.logprobs} exceeds the vocabulary of {vocab} tokens; ask for at most {vocab}"
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


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class SamplingState:
    """How B slots are sampled and what they have emitted so far: an immutable pytree, passed in and out of each step.

    Attributes:
      temperature_B: float32 [B]; 0 is greedy.
      top_k_B: int32 [B], 1..V; V is off.
      top_p_B: float32 [B]; 1 is off.
      min_p_B: float32 [B]; 0 is off.
      repetition_B: float32 [B]; 1 is off.
      frequency_B: float32 [B]; 0 is off.
      presence_B: float32 [B]; 0 is off.
      seed_B: uint32 [B].
      bias_BV: float32 [B, V], added to the logits.
      ends_BV: bool [B, V], the token ends the sequence.
      least_B: int32 [B], the position before which none of these is drawn.
      prompt_BV: bool [B, V], the token occurs in the prompt.
      counts_BV: int32 [B, V], occurrences of the token in the output.
    """

    temperature_B: Float32[Array, "B"]
    top_k_B: Int32[Array, "B"]
    top_p_B: Float32[Array, "B"]
    min_p_B: Float32[Array, "B"]
    repetition_B: Float32[Array, "B"]
    frequency_B: Float32[Array, "B"]
    presence_B: Float32[Array, "B"]
    seed_B: UInt32[Array, "B"]
    bias_BV: Float32[Array, "B V"]
    ends_BV: Bool[Array, "B V"]
    least_B: Int32[Array, "B"]
    prompt_BV: Bool[Array, "B V"]
    counts_BV: Int32[Array, "B V"]

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int] | np.ndarray],
        vocab: int,
        tokens: int | None = None,
        ends: Sequence[Collection[int]] | None = None,
    ) -> "SamplingState":
        """State of slots that have emitted nothing yet; an idle slot is `SamplingParams(temperature=0)` and `()`.

        Args:
          params: What each of the B slots asks for; sampled slots (temperature > 0) need a seed.
          prompts: Each slot's prompt token ids, for the repetition penalty.
          vocab: V, the width of the logits.
          tokens: how many of them the tokenizer has; the rest is padding of the head and never sampled. Default all.
          ends: what ends each sequence, for those with `min_new_tokens`; default nothing.

        Raises:
          ValueError: a parameter is out of range, a seed is missing, or a prompt id is outside the vocabulary.
        """
        return jax.tree.map(jnp.asarray, cls.on_host(params, prompts, vocab, tokens, ends))

    @classmethod
    def on_host(
        cls,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int] | np.ndarray],
        vocab: int,
        tokens: int | None = None,
        ends: Sequence[Collection[int]] | None = None,
    ) -> "SamplingState":
        """As `from_params`, in NumPy's arrays: what a program takes as it is."""
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling params but {len(prompts)} prompts; give one prompt per slot")
        slots = len(params)
        bias_BV = np.zeros((slots, vocab), np.float32)
        prompt_BV, ends_BV = np.zeros((2, slots, vocab), bool)
        for slot, (asked, prompt) in enumerate(zip(params, prompts, strict=True)):
            asked.validate(vocab)
            if asked.seed is None and asked.temperature > 0:
                raise ValueError(
                    f"seed None of slot {slot}, which samples at temperature {asked.temperature}; "
                    "draw one and set it with dataclasses.replace, or set temperature 0"
                )
            ids = np.asarray(prompt, np.int64)
            if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
                raise ValueError(
                    f"prompt of slot {slot} has token ids {ids.min()}..{ids.max()}, outside [0, {vocab - 1}]; "
                    "encode it with this model's tokenizer"
                )
            prompt_BV[slot, ids] = True
            for token, bias in asked.logit_bias.items():
                bias_BV[slot, token] = bias
            if ends is not None and asked.min_new_tokens:
                ends_BV[slot, [token for token in ends[slot] if token < vocab]] = True
        bias_BV[:, vocab if tokens is None else tokens :] = -np.inf

        def floats(name: str) -> np.ndarray:
            values_B = np.array([getattr(asked, name) for asked in params], np.float64)
            values_B[np.abs(values_B) < _SMALLEST] = 0  # devices disagree about subnormal numbers
            return values_B.astype(np.float32)

        arrays = {
            "temperature_B": floats("temperature"),
            "top_k_B": np.array([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], np.int32),
            "top_p_B": floats("top_p"),
            "min_p_B": floats("min_p"),
            "repetition_B": floats("repetition_penalty"),
            "frequency_B": floats("frequency_penalty"),
            "presence_B": floats("presence_penalty"),
            "seed_B": np.array([p.seed or 0 for p in params], np.uint32),
            "bias_BV": bias_BV,
            "ends_BV": ends_BV,
            "least_B": np.array([len(i) + p.min_new_tokens for i, p in zip(prompts, params, strict=True)], np.int32),
            "prompt_BV": prompt_BV,
            "counts_BV": np.zeros((slots, vocab), np.int32),
        }
        return cls.tree_unflatten(None, [arrays[f.name] for f in fields(cls)])

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """Leaves with their names, for JAX."""
        return [(jax.tree_util.GetAttrKey(f.name), getattr(self, f.name)) for f in fields(self)], None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "SamplingState":
        """Rebuild without `__init__`: JAX also makes trees of shardings, specs and batched leaves, whose shapes differ."""
        state = object.__new__(cls)
        for f, leaf in zip(fields(cls), leaves, strict=True):
            object.__setattr__(state, f.name, leaf)
        return state


def _check_token(name: str, token: int, vocab: int) -> None:
    if not 0 <= token < vocab:
        raise ValueError(
            f"{name} has token id {token}, outside [0, {vocab - 1}] of this vocabulary; "
            "leave it out, or encode the text with this model's tokenizer"
        )
