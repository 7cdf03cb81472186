"""What a generation says: its text as far as it is certain, and where and why it ends."""

from __future__ import annotations

from glmjax.model.grammar import Matcher
from glmjax.model.output_text import OutputText
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import Stops
from glmjax.model.tokenizer import Tokenizer


class Reply:
    """Tokens in, text out, until a stop token, a stop string, the end of the grammar or the limit.

    Args:
        stops: the model's and the request's.
        tokenizer: for the text, or None.
        params: of the text; see `OutputText`.
        new_tokens: most tokens to take.
        matcher: of its grammar, from now on the reply's own; or None.

    Attributes:
        ids: tokens so far, a final stop token included.
        text: so far; without a stop token's own.
        finish_reason: "stop" (a stop token, a stop string, nothing that the grammar allows) or "length" once it has
            ended, else None.
        matched: the stop token or stop string that ended it, or None.
        matcher: where it is in its grammar, or None.
    """

    def __init__(
        self,
        stops: Stops,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        new_tokens: int,
        matcher: Matcher | None = None,
    ):
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.matched: int | str | None = None
        self.matcher = matcher
        self._stops, self._new_tokens = stops, new_tokens
        self._text = OutputText(tokenizer, stops.strings, params, new_tokens)

    def push(self, token: int) -> str:
        """Add a token; the text that can be shown now, often "" while a character or a possible stop string is incomplete.

        Raises:
            ValueError: it has ended.
        """
        if self.finish_reason:
            raise ValueError(f"the generation has ended ({self.finish_reason}); token {token} is none of it")
        self.ids.append(token)
        if self.matcher is not None:
            self.matcher.push(token)
        stops, full = token in self._stops.token_ids, len(self.ids) == self._new_tokens
        over = self.matcher is not None and self.matcher.ended
        text, stop = self._text.push(token, silent=stops)
        if (stops or over or full) and stop is None:
            tail, stop = self._text.flush()
            text += tail
        if stops or over or stop is not None:
            self.finish_reason = "stop"
            self.matched = stop if stop is not None else token if stops else None
        elif full:
            self.finish_reason = "length"
        self.text += text
        return text
