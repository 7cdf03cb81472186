"""Sampling parameters as flags of a command line."""

from __future__ import annotations

import dataclasses

import tyro

from glmjax.model.sampling_params import SamplingParams

_DEFAULTS = SamplingParams()


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How text is sampled and when it ends.

    Attributes:
        max_new_tokens: most tokens to generate.
        min_new_tokens: do not end before so many.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of tokens with this mass; 1 is off.
        min_p: keep tokens at least this likely relative to the best; 0 is off.
        repetition_penalty: above 1 discourages tokens seen in prompt or output.
        frequency_penalty: subtracted per occurrence in the output.
        presence_penalty: subtracted once if in the output.
        stop: a string that ends the text; may be given several times.
        ignore_eos: go on after end-of-sequence tokens.
        random_seed: fixes sampled output; default random.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = _DEFAULTS.min_new_tokens
    temperature: float = _DEFAULTS.temperature
    top_k: int = _DEFAULTS.top_k
    top_p: float = _DEFAULTS.top_p
    min_p: float = _DEFAULTS.min_p
    repetition_penalty: float = _DEFAULTS.repetition_penalty
    frequency_penalty: float = _DEFAULTS.frequency_penalty
    presence_penalty: float = _DEFAULTS.presence_penalty
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    ignore_eos: bool = False
    random_seed: int | None = None

    def sampling(self) -> SamplingParams:
        """As parameters."""
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        chosen = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return SamplingParams(**chosen, seed=self.random_seed)
