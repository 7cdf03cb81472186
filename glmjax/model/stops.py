"""When a generation ends: at a token id, or where a string appears in the text."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmjax.model.tokenizer import read_json


@dataclass(frozen=True)
class Stops:
    """What ends a generation, its length limit aside.

    Attributes:
        token_ids: a token of these ends the generation and is no part of its text.
        strings: the first of these to be completed in the text ends the generation; see `StopMatcher`.

    Raises:
        ValueError: a negative id, or an empty string, which would match everywhere.
    """

    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self):
        for token in self.token_ids:
            if token < 0:
                raise ValueError(f"stop token id {token} is negative; token ids start at 0")
        _check_strings(self.strings)

    @classmethod
    def from_dir(
        cls,
        path: str | os.PathLike[str],
        token_ids: Iterable[int] = (),
        strings: Iterable[str] = (),
        ignore_eos: bool = False,
    ) -> "Stops":
        """The stops of a checkpoint directory, and a request's own.

        The checkpoint's are `eos_token_id`, an id or a list of ids, of generation_config.json and of config.json
        together (GLM: `<|endoftext|>`, `<|user|>`, `<|observation|>`). The other arguments are those of `extended`.

        Raises:
            FileNotFoundError: neither file is there.
            ValueError: an `eos_token_id` is neither an id nor a list of ids, or as for `Stops`.
        """
        files = [Path(path) / name for name in ("generation_config.json", "config.json")]
        if not any(file.is_file() for file in files):
            raise FileNotFoundError(
                f"neither generation_config.json nor config.json in {Path(path).absolute()}; give the directory of a "
                "checkpoint"
            )
        eos = [token for file in files for token in _token_ids(read_json(file).get("eos_token_id"), file)]
        return cls(frozenset(eos)).extended(token_ids, strings, ignore_eos)

    def extended(self, token_ids: Iterable[int] = (), strings: Iterable[str] = (), ignore_eos: bool = False) -> "Stops":
        """These stops and a request's own `token_ids` and `strings`.

        With `ignore_eos` the token ids here, those of the checkpoint, are left out, while the request's own still hold:
        for benchmarks that need a certain length.
        """
        if isinstance(strings, str):
            raise ValueError(f"stop strings must be a list of strings, not the string {strings!r}; give [{strings!r}]")
        kept = frozenset() if ignore_eos else self.token_ids
        return Stops(kept | frozenset(token_ids), tuple(dict.fromkeys((*self.strings, *strings))))


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and lets no part of one out too early.

    The stop string that is *completed* first wins, so a generation ends with the very token that completes one; of
    several completed by the same character, the longest. Result and emitted text do not depend on how the text is cut
    into pieces.

    Args:
        strings: the stop strings; with none, all text passes at once.
        include: emit the stop string too (vLLM's `include_stop_str_in_output`); what follows it is dropped always.

    Attributes:
        matched: the stop string found, or None.
    """

    def __init__(self, strings: Iterable[str], include: bool = False):
        self._strings = tuple(strings)
        _check_strings(self._strings)
        self._include = include
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; what can be emitted now, and the stop string that has matched, or None.

        Kept back is the longest end of the text with which a stop string could begin, always shorter than the longest
        stop string. After a match, all further text is dropped and the same stop string returned.
        """
        if self.matched is not None:
            return "", self.matched
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._strings if (start := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start], self.matched
        certain = len(text) - self._possible_start(text)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """The text kept back, when the generation ends for another reason; "" after a match."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._strings):
                return length
        return 0


def _check_strings(strings: tuple[str, ...]) -> None:
    if "" in strings:
        raise ValueError(f"stop string {strings.index('')} is empty and would match everywhere; leave it out")


def _token_ids(value: Any, file: Path) -> list[int]:
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"eos_token_id {value!r} in {file} is neither a token id nor a list of them; correct it")
    return tokens
