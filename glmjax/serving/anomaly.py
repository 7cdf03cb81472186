"""What speculation says about a request: output that the drafts suddenly agree with too little, or too much, may be garbled.

The rules are those that Z.ai published of its serving of GLM-5: accept length below 1.4 with more than 128 tokens
generated goes with garbled text, accept rate above 0.96 with repetition. Honest text does both at times (random strings,
boilerplate), so a suspicion is confirmed before anything is done about it (`glmjax.serving.scheduler`).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class AnomalyRules:
    """When a request is suspicious.

    Attributes:
        enabled: whether to look at all.
        shortest_length: mean tokens of a round below which it is.
        least_tokens: that it must have generated for the rule above.
        largest_rate: accepted of proposed drafts above which it is.
        window: rounds that are looked at: the last ones in which as much was drafted as can be.
        confirm: read prompt and output again on other pages and compare, before anything is aborted.
    """

    enabled: bool = True
    shortest_length: float = 1.4
    least_tokens: int = 128
    largest_rate: float = 0.96
    window: int = 64
    confirm: bool = True

    def __post_init__(self):
        if self.window < 1 or self.least_tokens < 0:
            raise ValueError(f"window {self.window} must be at least 1 and least_tokens {self.least_tokens} at least 0")
        if not self.shortest_length >= 1 or not 0 <= self.largest_rate <= 1:
            raise ValueError(
                f"shortest_length {self.shortest_length} must be at least 1 and largest_rate {self.largest_rate} within "
                "0..1; use 1 and 1 to turn a rule off"
            )


class Detector:
    """Of one request.

    Args:
        rules: when it is suspicious.
    """

    def __init__(self, rules: AnomalyRules):
        self._rules = rules
        self._rounds: deque[tuple[int, int]] = deque(maxlen=rules.window)  # tokens and drafts of each
        self._silent = self._silence = 0  # rounds that it still keeps silent, and how many the last time

    def push(self, counts: Sequence[int], drafts: int) -> None:
        """Rounds: the tokens that each gave, with so many drafts. Those without drafts do not count.

        Rounds of grammars, and of fewer drafts than there can be, are not told.
        """
        if drafts:
            self._rounds.extend((count, drafts) for count in counts)
            self._silent = max(0, self._silent - len(counts))

    def suspicion(self, tokens: int) -> str | None:
        """What is suspicious now, or None.

        Args:
            tokens: generated so far.
        """
        rules = self._rules
        if not rules.enabled or self._silent or len(self._rounds) < rules.window:
            return None
        emitted, drafted = (sum(column) for column in zip(*self._rounds, strict=True))
        length, rate = emitted / len(self._rounds), (emitted - len(self._rounds)) / drafted
        if length < rules.shortest_length and tokens > rules.least_tokens:
            return f"accept length {length:.2f} below {rules.shortest_length} over {len(self._rounds)} rounds"
        if rate > rules.largest_rate:
            return f"accept rate {rate:.2f} above {rules.largest_rate} over {len(self._rounds)} rounds"
        return None

    def benign(self) -> None:
        """It was nothing: keep silent for a while, for twice as long every time."""
        self._silence = max(2 * self._silence, self._rules.window)
        self._silent = self._silence
