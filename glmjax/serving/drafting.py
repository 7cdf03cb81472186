"""How far to draft: as far as gives most tokens a second. Now and then otherwise, for what pays changes with the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_PROBE_EVERY = 16  # dispatches of decoding
_PRIOR, _MEMORY = 4.0, 64.0  # rounds that expectation counts for, and that are remembered


class Acceptance:
    """How often drafts are accepted: of one request, or of all; averaged over the last rounds.

    Args:
        others: what is expected before there have been rounds; without them, that everything is accepted.
    """

    def __init__(self, others: Acceptance | None = None):
        self._others = others
        self._likely: list[float] = []  # that the first draft of a round is accepted, the first two, and so on
        self._rounds: list[float] = []

    def push(self, accepted: Sequence[int], rounds: int) -> None:
        """Learn from rounds.

        Args:
            accepted: in how many of them the first draft was accepted, the first two, and so on.
            rounds: how many there were, at least one.
        """
        for n, hits in enumerate(accepted):
            if n == len(self._likely):
                self._likely.append(self._expected(n))
                self._rounds.append(_PRIOR)
            known = self._rounds[n]
            self._likely[n] = (known * self._likely[n] + hits) / (known + rounds)
            self._rounds[n] = min(known + rounds, _MEMORY)

    def tokens(self, depth: int) -> float:
        """Of a round with so many drafts, expected."""
        return 1.0 + sum(self._expected(n) for n in range(depth))

    def _expected(self, n: int) -> float:
        if n < len(self._likely):
            return self._likely[n]
        return 1.0 if self._others is None else self._others._expected(n)


def depths(num_draft: int, adapts: bool) -> tuple[int, ...]:
    """How many tokens may be drafted in a round, most first: num_draft, half of it, …, none.

    Args:
        num_draft: most.
        adapts: whether there is a choice; else it is always most.
    """
    found = [num_draft]
    while adapts and found[-1]:
        found.append(found[-1] // 2)
    return tuple(found)


class Depths:
    """Chooses, for each dispatch of decoding, how many tokens to draft in its rounds.

    Args:
        choices: from `depths`.
    """

    def __init__(self, choices: Sequence[int]):
        self._choices = choices
        self._turn = 0

    def choose(self, requests: Sequence[Acceptance], seconds: Callable[[int], float | None]) -> int:
        """For the next dispatch.

        Args:
            requests: who takes part.
            seconds: that a round takes with so many drafts; None where that is not known, and so is tried.
        """
        if len(self._choices) == 1:
            return self._choices[0]
        self._turn += 1
        probe, due = divmod(self._turn, _PROBE_EVERY)
        if not due:  # most, from which most is learned and which the detector of anomalies needs, and another, in turn
            return self._choices[0] if probe % 2 else self._choices[1 + probe // 2 % (len(self._choices) - 1)]
        took = {depth: seconds(depth) for depth in self._choices}
        unknown = [depth for depth in self._choices if took[depth] is None]
        if unknown:
            return unknown[0]
        return max(self._choices, key=lambda depth: sum(one.tokens(depth) for one in requests) / took[depth])
