"""What a generation says: its text as far as it is certain, and where and why it ends."""

from __future__ import annotations

from glmjax.model.stops import StopMatcher, Stops
from glmjax.model.tokenizer import Tokenizer


class Reply:
    """Tokens in, text out, until a stop token, a stop string or the limit.

    Args:
        stops: the model's and the request's.
        tokenizer: for the text, or None.
        new_tokens: most tokens to take.
        include_stop: leave a stop string at the end of the text.

    Attributes:
        ids: tokens so far, a final stop token included.
        text: so far; without a stop token's own.
        finish_reason: "stop" (a stop token, a stop string) or "length" once it has ended, else None.
        matched: the stop token or stop string that ended it, or None.
    """

    def __init__(self, stops: Stops, tokenizer: Tokenizer | None, new_tokens: int, include_stop: bool = False):
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.matched: int | str | None = None
        self._stops, self._new_tokens = stops, new_tokens
        self._matcher = StopMatcher(stops.strings, include_stop)
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None

    def push(self, token: int) -> str:
        """Add a token; the text that can be shown now, often "" while a character or a possible stop string is incomplete.

        Raises:
            ValueError: it has ended.
        """
        if self.finish_reason:
            raise ValueError(f"the generation has ended ({self.finish_reason}); token {token} is none of it")
        self.ids.append(token)
        ended, full = token in self._stops.token_ids, len(self.ids) == self._new_tokens
        text, stop = self._matcher.push(self._detokenizer.push(token) if self._detokenizer and not ended else "")
        if (ended or full) and stop is None and self._detokenizer:
            tail, stop = self._matcher.push(self._detokenizer.flush())
            text += tail + self._matcher.flush()
        if ended or stop is not None:
            self.finish_reason, self.matched = "stop", token if stop is None else stop
        elif full:
            self.finish_reason = "length"
        self.text += text
        return text
