"""A request: what was asked, what it has emitted, and how it went."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Hashable

from glmjax.model.grammar import Matcher
from glmjax.model.reply import Reply
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import Stops
from glmjax.model.tokenizer import Tokenizer
from glmjax.serving.anomaly import AnomalyRules, Detector
from glmjax.serving.drafting import Acceptance
from glmjax.serving.pool import Lease
from glmjax.serving.stream import Score, Statistics, Stream

_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        params: validated, with a seed where it samples.
        new_tokens: most tokens to emit.
        stops: the model's and the request's.
        tokenizer: for text and stop strings, or None.
        matcher: of its grammar, at its beginning; or None.
        stream: where its tokens go.
        index: which of the stream's sequences it is.
        client: who asks, for fairness among those who wait.
        priority: the lower, the sooner; requests of another priority wait longer, not for ever.
        deadline: `time.monotonic()` after which it is not worth going on, or None.
        namespace: what must be the same beside the tokens for pages to be shared.
        reuse: whether it may use and leave pages in the prefix tree.
        hook: its treatment by the engine's hooks; 0 for none.
        loads: whether it may wait for pages from the host's memory.
        siblings: other sequences of the same prompt, which begin to wait when its pages can be shared.
        number: in order of creation.
        arrived: `time.monotonic()` when it was made.
        admitted: when it first got a slot, or None.
        began: when its first token came, or None.
        reply: what it has emitted.
        prompt_scores: of the prompt's tokens from the second on, as far as they have been asked for and read.
        cached: prompt tokens that were found when it was first admitted, in the prefix tree or in the host's memory.
        rounds: rounds of decoding it has taken part in.
        drafted: drafts proposed in them.
        accepted: drafts accepted.
        acceptance: how likely more of them are.
        preemptions: how often it has lost its pages to others.
        replays: how often it has lost them to a fault.
        restarts: how often it has begun anew, since its output was garbled.
        rules: when it is suspicious.
        detector: of anomalies.
        suspects: pages it had when it became suspicious, until it is cleared.
        reason: why it did.
    """

    prompt: list[int]
    params: SamplingParams
    new_tokens: int
    stops: Stops = dataclasses.field(default_factory=Stops)
    tokenizer: Tokenizer | None = None
    matcher: Matcher | None = None
    stream: Stream = dataclasses.field(default_factory=Stream)
    index: int = 0
    client: Hashable = None
    priority: int = 0
    deadline: float | None = None
    namespace: Hashable = None
    reuse: bool = True
    hook: int = 0
    loads: bool = True
    siblings: list[Request] = dataclasses.field(default_factory=list)
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    admitted: float | None = None
    began: float | None = None
    reply: Reply = dataclasses.field(init=False)
    prompt_scores: list[Score] = dataclasses.field(init=False)
    cached: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    acceptance: Acceptance = dataclasses.field(default_factory=Acceptance)
    preemptions: int = 0
    replays: int = 0
    restarts: int = 0
    rules: AnomalyRules = dataclasses.field(default_factory=AnomalyRules)
    detector: Detector = dataclasses.field(init=False)
    suspects: frozenset[Lease] = frozenset()
    reason: str = ""

    def __post_init__(self):
        self.restart()

    def restart(self) -> None:
        """Nothing has been emitted."""
        matcher = self.matcher and self.matcher.at(0)
        self.reply = Reply(self.stops, self.tokenizer, self.params, self.new_tokens, matcher)
        self.detector = Detector(self.rules)
        self.prompt_scores = []

    @property
    def scoring(self) -> bool:
        """Whether logprobs of its prompt are still to come: tokens have to be read for them."""
        return self.params.prompt_logprobs is not None and len(self.prompt_scores) < len(self.prompt) - 1

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end it."""
        return tuple(sorted(self.stops.token_ids))

    @property
    def ids(self) -> list[int]:
        """Prompt and what was emitted: what must have rows before it can go on."""
        return self.prompt + self.reply.ids

    @property
    def cost(self) -> int:
        """Tokens it may take in all."""
        return len(self.prompt) + self.new_tokens

    def statistics(self, now: float) -> Statistics:
        """How it has gone so far.

        Args:
            now: `time.monotonic()`.
        """
        return Statistics(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            new_tokens=len(self.reply.ids),
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            queue_seconds=(self.admitted or now) - self.arrived,
            first_token_seconds=None if self.began is None else self.began - self.arrived,
            seconds=now - self.arrived,
            preemptions=self.preemptions,
            replays=self.replays,
            seed=self.params.seed,
        )
