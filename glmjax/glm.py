"""The library's handle on a model: load it, run it, generate with it."""

from __future__ import annotations

import dataclasses
import functools
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.decoding import Generation
from glmjax.model import checkpoint
from glmjax.model.assemble import Placement, on_one_device
from glmjax.model.cache import previous_hidden, row_dtype, whole_sequences
from glmjax.model.chat import ChatTemplate
from glmjax.model.config import GlmConfig
from glmjax.model.grammar import Grammars, Matcher
from glmjax.model.infill import BlankTokens
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import Stops
from glmjax.model.tokenizer import Tokenizer
from glmjax.model.transformer import LayerView, Transformer
from glmjax.nano import NANO
from glmjax.pallas.selection import positions

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | np.ndarray | jax.Array | Sequence[Message]
"""Text, token ids, or chat messages."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """What the layers chose, a list entry per layer.

    Attributes:
        selected: positions each token attended to, int32 [B, T, K], ascending, −1 after them.
        experts: experts each token took, int32 [B, T, X]; None for a dense layer.
    """

    selected: list[np.ndarray]
    experts: list[np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Output:
    """What `GLM.forward` computes.

    Attributes:
        logits_BTV: float32; entry t predicts token t + 1.
        hidden_BTD: after the final norm.
        mtp_logits_BTV: float32, for T − 1 entries: entry t predicts token t + 2 from token t + 1 and hidden t; None
            without MTP weights.
        trace: what the layers chose, where asked for.
    """

    logits_BTV: jax.Array
    hidden_BTD: jax.Array
    mtp_logits_BTV: jax.Array | None
    trace: Trace | None = None


class Asked(NamedTuple):
    """What is to be generated.

    Attributes:
        ids: the prompt's tokens.
        params: validated, with a seed.
        stops: the model's and the request's.
        new_tokens: most tokens to generate.
        matcher: of the grammar, at its beginning; None where none is asked for.
    """

    ids: list[int]
    params: SamplingParams
    stops: Stops
    new_tokens: int
    matcher: Matcher | None = None


def load(
    model_path: str | os.PathLike[str] = NANO,
    *,
    dtype: Any = None,
    load_format: checkpoint.LoadFormat = "auto",
    fp8: checkpoint.Fp8 = "keep",
    mtp: bool | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    place: Placement = on_one_device,
    seed: int = 0,
    kv_cache_dtype: Any = None,
) -> GLM:
    """Load a model with its tokenizer; without a path the one in the box.

    See `glmjax.model.checkpoint.load` for the arguments and errors. A directory without ``tokenizer.json`` gives a model
    that takes and gives token ids only. ``kv_cache_dtype`` is that of cached rows, default the model's: "float32",
    "bfloat16", or "fp8", which keeps a byte a number and scales (`glmjax.pallas.packed_rows`).
    """
    weights = checkpoint.load(
        model_path, dtype=dtype, load_format=load_format, fp8=fp8, mtp=mtp, place=place, seed=seed
    )
    text = Path(tokenizer_path or model_path)
    has_text = tokenizer_path is not None or (text / "tokenizer.json").is_file()
    return GLM(
        weights,
        Tokenizer.from_dir(text) if has_text else None,
        ChatTemplate.from_dir(text),
        Stops.from_dir(model_path).extended(token_ids=weights.config.eos_token_id),
        kv_cache_dtype,
    )


class GLM:
    """A model, its tokenizer and its stops.

    Attributes:
        weights: the network.
        tokenizer: None where the checkpoint has none.
        chat_template: the checkpoint's own, or None.
        stops: token ids that end a generation.
        kv_cache_dtype: of the rows that `generate` and engines cache.
    """

    def __init__(
        self,
        weights: Transformer,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        stops: Stops,
        kv_cache_dtype: Any = None,
    ):
        self.weights, self.tokenizer, self.chat_template, self.stops = weights, tokenizer, chat_template, stops
        self.kv_cache_dtype = row_dtype(kv_cache_dtype or weights.dtype)

    @property
    def config(self) -> GlmConfig:
        """The model's."""
        return self.weights.config

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What JSON schemas, regular expressions and grammars say of the vocabulary.

        Raises:
            ValueError: there is no tokenizer, or no token that ends a turn.
        """
        return Grammars(self.tokenizer, self.stops, self.config.vocab_size)

    def forward(self, ids_BT: Any, *, trace: bool = False) -> Output:
        """Logits and hidden states of whole sequences; memory grows linearly with their length, logits aside.

        Args:
            ids_BT: token ids, equally long sequences.
            trace: also return the layers' selections and router choices.

        Raises:
            ValueError: no token, an id outside the vocabulary, or a sequence longer than the context.
        """
        try:
            ids = np.asarray(ids_BT)
        except ValueError as error:  # ragged
            raise ValueError("ids_BT is no array; give equally long sequences") from error
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"ids_BT has shape {ids.shape}; give [sequences, tokens] with at least one of each")
        self._check_ids(ids)
        self._check_length(ids.shape[1], 0)
        logits, hidden, mtp, seen = _forward(self.weights, jnp.asarray(ids, jnp.int32), trace)
        if not trace:
            return Output(logits, hidden, mtp)
        experts = [None if choice is None else np.asarray(choice) for _, choice in seen]
        return Output(logits, hidden, mtp, Trace([np.asarray(selected) for selected, _ in seen], experts))

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Generation:
        """Stream tokens: ``for token in glm.generate("def ", temperature=0): print(token.text, end="")``.

        Args:
            prompt: text, token ids, or chat messages, to which the checkpoint's template is applied.
            params: how to sample and when to stop.
            template: arguments for the chat template: ``tools``, ``enable_thinking``, …
            fields: fields of `SamplingParams`, instead of or over those of `params`.

        Returns:
            An iterator of tokens that collects ids, text and statistics; ``.finish()`` runs it to its end.

        Raises:
            ValueError: bad parameters, an empty prompt, an id outside the vocabulary, more tokens than the context has, or a
                grammar or logprobs of the prompt, which `glmjax.Engine` serves.
        """
        asked = self.asked(prompt, params, template=template, **fields)
        if asked.matcher is not None:
            raise ValueError(
                f"{asked.params.constraint} needs an engine: glmjax.Engine(glm, EngineConfig(grammars=True)).generate(…)"
            )
        if asked.params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs needs an engine: glmjax.Engine(glm).generate(…)")
        return Generation(
            self.weights, asked.ids, asked.params, asked.stops, self.tokenizer, asked.new_tokens, self.kv_cache_dtype
        )

    def asked(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        limit: int | None = None,
        **fields: Any,
    ) -> Asked:
        """What a call to `generate` comes to, checked.

        Args:
            prompt: as for `generate`.
            params: as for `generate`.
            template: as for `generate`.
            limit: most tokens, prompt and new ones; default the model's context.
            **fields: as for `generate`.

        Raises:
            ValueError: as for `generate`.
        """
        params = dataclasses.replace(params or SamplingParams(), **fields)
        params.validate(self.config.vocab_size)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(32))
        ids = self.encode(prompt, **(template or {}))
        least = max(params.max_new_tokens or 1, params.min_new_tokens)
        room = self._check_length(len(ids), least, limit) - len(ids)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; this model was loaded without one")
        stops = self.stops.extended(params.stop_token_ids, params.stop, params.ignore_eos)
        matcher = self.grammars.matcher(params, ids) if params.constraint else None
        return Asked(ids, params, stops, params.max_new_tokens or room, matcher)

    def infill(self, prefix: str, suffix: str = "", params: SamplingParams | None = None, **fields: Any) -> Generation:
        """Stream what belongs between two texts, for models that were trained on blanks (GLM's `[MASK]`).

        Args:
            prefix: text before the blank; may be empty.
            suffix: text after it; without it the blank is at the end, and the model says where the text is over.
            params: as for `generate`.
            fields: as for `generate`.

        Raises:
            ValueError: no tokenizer, one without the tokens for blanks, or as for `generate`.
        """
        if self.tokenizer is None:
            raise ValueError("this model was loaded without a tokenizer; give tokenizer_path to load")
        blanks = BlankTokens.of(self.tokenizer)
        ids = blanks.prompt(self.tokenizer.encode(prefix), self.tokenizer.encode(suffix))
        params = dataclasses.replace(params or SamplingParams(), **fields)
        stops = (*params.stop_token_ids, blanks.eop)
        return self.generate(ids, dataclasses.replace(params, stop_token_ids=stops))

    def encode(self, prompt: Prompt, **template: Any) -> list[int]:
        """Token ids of a prompt as `generate` takes it.

        Args:
            prompt: text, a sequence of token ids, or chat messages.
            **template: arguments for the chat template.

        Raises:
            ValueError: it is empty, has an id outside the vocabulary, or needs a tokenizer or template that is not there.
        """
        if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
            if self.chat_template is None:
                raise ValueError("this model has no chat template; give text or token ids")
            prompt = self.chat_template.render(list(prompt), **template)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model was loaded without a tokenizer; give token ids, or tokenizer_path to load")
            prompt = self.tokenizer.encode(prompt)
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise ValueError("the prompt has no tokens; give at least one")
        if ids.ndim != 1:
            raise ValueError(
                f"the prompt's token ids have shape {ids.shape}; give one sequence, e.g. ids[0] of a batch"
            )
        self._check_ids(ids)
        return ids.tolist()

    def _check_ids(self, ids: np.ndarray) -> None:
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids are {ids.dtype}; they must be integers")
        outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary, 0..{self.config.vocab_size - 1}")

    def _check_length(self, prompt: int, new: int, limit: int | None = None) -> int:
        limit = limit or self.config.max_position_embeddings
        if prompt + new > limit:
            asked = f"{prompt} tokens" if new == 0 else f"{prompt} prompt tokens and {new} new ones"
            raise ValueError(f"{asked} exceed the model's context of {limit}; shorten the prompt or ask for fewer")
        return limit


@functools.partial(jax.jit, static_argnames="trace")
def _forward(weights: Transformer, ids_BT: jax.Array, trace: bool) -> tuple[Any, ...]:
    def choices(view: LayerView) -> tuple[jax.Array, jax.Array | None]:
        return positions(view.selected, weights.config.index_topk), view.choice_BTX

    cache, step = whole_sequences(weights.config, ids_BT, weights.dtype)
    out = weights.backbone(ids_BT, cache, step, observe=choices if trace else None)
    mtp_logits = None
    if weights.mtp is not None:
        previous_BTD = previous_hidden(out.hidden_BTD, cache.tail_BD)
        draft = weights.draft(ids_BT, previous_BTD, cache, step)
        mtp_logits = weights.head(draft.hidden_BTD[:, 1:])
    return weights.head(out.hidden_BTD), out.hidden_BTD, mtp_logits, out.observed
