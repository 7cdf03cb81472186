"""Why a request can fail although it was well-formed; bad input is a `ValueError` before it gets here."""


class QueueFullError(RuntimeError):
    """No more requests may wait. Come again later, or go elsewhere."""


class DeadlineError(TimeoutError):
    """A request's time is over. What it had emitted until then was delivered."""


class UnavailableError(RuntimeError):
    """The engine could not finish a request through no fault of the request's; another replica may."""


class GrammarError(RuntimeError):
    """A grammar could not be followed to its end: it is too complex. What was emitted until then was delivered."""


class AnomalyError(UnavailableError):
    """A request's output was garbled: its pages held what they should not.

    Attributes:
        good_tokens: how many of the tokens that were sent are right.
    """

    def __init__(self, reason: str, good_tokens: int):
        super().__init__(
            f"the output became wrong after {good_tokens} tokens ({reason}); send the request to another replica"
        )
        self.good_tokens = good_tokens


class ClosedError(RuntimeError):
    """The engine takes no more requests."""
