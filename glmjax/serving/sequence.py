"""A request while it has a slot: its pages, and how far it is."""

from __future__ import annotations

import dataclasses
import enum

from glmjax.model.grammar import Matcher
from glmjax.serving.offload import Loading
from glmjax.serving.pool import Lease
from glmjax.serving.request import Request


class Leaving(enum.Enum):
    """Why a sequence takes part in no more dispatches. It gives back pages and slot once the last log has been read."""

    DONE = enum.auto()  # finished, cancelled, or out of time: nobody wants what may still come
    PREEMPTED = enum.auto()  # its pages go to others; it will be read again, and go on
    REPLAYED = enum.auto()  # a fault has taken its pages; the same
    SUSPECTED = enum.auto()  # it will be read again, and what it has emitted be confirmed before it goes on


@dataclasses.dataclass(eq=False)
class Sequence:
    """See the module.

    Attributes:
        request: whose.
        slot: on the device.
        generation: of the slot, while it is this sequence's.
        leases: its pages in order.
        ids: what has to be read before it decodes.
        sent: how many of them are read once all dispatches so far have run.
        rows: how many rows it has for certain: cached, or told by a log.
        landed: how many rows it has once all landings so far have happened; 0 without any.
        loading: pages on their way to it, which it waits for, or None.
        expected: tokens it had emitted before, which are to be confirmed.
        confirmed: how many of them have been.
        turn: chunks it has had, for turns among those who read.
        leader: who is reading the same prefix, which is waited for instead of reading it, too; or None.
        common: tokens of that prefix, whole pages.
        begun: the dispatch that draws its first token has been made.
        unread: dispatches whose log has not been read.
        promised: tokens that these will emit at least, if they do not stop before.
        leaving: see `Leaving`.
    """

    request: Request
    slot: int
    generation: int
    leases: list[Lease]
    ids: list[int]
    sent: int
    rows: int
    landed: int = 0
    loading: Loading | None = None
    expected: tuple[int, ...] = ()
    confirmed: int = 0
    turn: int = 0
    leader: Sequence | None = None
    common: int = 0
    begun: bool = False
    unread: int = 0
    promised: int = 0
    leaving: Leaving | None = None

    @property
    def end(self) -> int:
        """Position that its newest token may reach."""
        return self.request.cost - 1

    @property
    def position(self) -> int:
        """Of its newest token that is known."""
        emitted = self.confirmed if self.confirming else len(self.request.reply.ids)
        return len(self.request.prompt) + emitted - 1

    @property
    def confirming(self) -> bool:
        """Whether tokens it had emitted are still to be confirmed."""
        return self.confirmed < len(self.expected)

    @property
    def confirms(self) -> bool:
        """Whether the next of them can be."""
        return self.confirming and self.begun and self.leaving is None and not self.unread

    @property
    def reads(self) -> bool:
        """Whether prompt tokens are left to be sent."""
        return not self.begun and self.leaving is None and self.loading is None

    @property
    def decodes(self) -> bool:
        """Whether another dispatch may bring it further, without a grammar."""
        return self.request.reply.matcher is None and self._goes_on

    @property
    def obeys(self) -> bool:
        """Whether another round may bring it further under its grammar, which has to know all tokens before."""
        return self.request.reply.matcher is not None and self._goes_on and not self.unread

    @property
    def _goes_on(self) -> bool:
        ready = self.begun and self.leaving is None and not self.confirming
        return ready and self.position + self.promised < self.end

    @property
    def matcher(self) -> Matcher | None:
        """Where it is in its grammar: after its newest token that is known, or confirmed."""
        matcher = self.request.reply.matcher
        return matcher.at(self.confirmed) if matcher and self.confirming else matcher

    def guesses(self, most: int) -> list[int]:
        """Tokens that come next: those to be confirmed, or those that its grammar forces."""
        matcher = self.request.reply.matcher
        if self.confirming:
            return list(self.expected[self.confirmed :][:most])
        return list(matcher.forced[:most]) if matcher else []
