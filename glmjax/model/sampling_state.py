"""The arrays from which a step reads how its slots are sampled.

Letters: B slots, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from glmjax.model.sampling_params import SMALLEST, SamplingParams


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
            values_B[np.abs(values_B) < SMALLEST] = 0  # devices disagree about subnormal numbers
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
