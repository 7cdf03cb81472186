"""The text of one generation, as far as it is certain: without the tokens and stop strings that end it."""

from __future__ import annotations

from collections.abc import Iterable

from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import StopMatcher
from glmjax.model.tokenizer import Tokenizer


class OutputText:
    """Tokens in, text out. Used where tokens are made and where they are received, so that both read the same.

    Args:
        tokenizer: whose tokens they are; None for no text.
        strings: that end it where they appear.
        params: how many tokens there must be before a stop string counts, whether it stays at the end of the text, and
            whether special tokens are in that.
        new_tokens: most tokens there can be, the last of which counts in any case; None where that is not known.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, strings: Iterable[str], params: SamplingParams, new_tokens: int | None
    ):
        self._detokenizer = tokenizer.detokenizer(params.skip_special_tokens) if tokenizer is not None else None
        self._strings = StopMatcher(tuple(strings), params.include_stop_str_in_output)
        self._least, self._most, self._count = params.min_new_tokens, new_tokens, 0

    def push(self, token: int, *, silent: bool = False) -> tuple[str, str | None]:
        """Add a token.

        Args:
            token: its id.
            silent: it ends the sequence, so it has no text.

        Returns:
            the text that can be shown now, often "" while a character or a possible stop string is incomplete; and the stop
            string that has appeared, or None.
        """
        self._count += 1
        text = self._detokenizer.push(token) if self._detokenizer is not None and not silent else ""
        return self._strings.push(text) if self._count > self._least or self._count == self._most else (text, None)

    def flush(self) -> tuple[str, str | None]:
        """At the end, whatever it was: the text kept back, and the stop string in it, or None."""
        text, stop = self._strings.push(self._detokenizer.flush() if self._detokenizer is not None else "")
        return text + self._strings.flush(), stop
