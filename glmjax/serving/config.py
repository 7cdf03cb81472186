"""What an engine is given, in one place; the command line reads its defaults here."""

from __future__ import annotations

import dataclasses

from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.faults import FaultRates


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of an engine.

    Attributes:
        max_model_len: most tokens of a sequence, prompt and new ones; None is the model's context.
        max_num_seqs: sequences that decode at once.
        page_size: rows of a page: what is shared and what is granted at a time. More makes reading cheaper and hits
            rarer.
        pages: of the cache; None is enough for `max_num_seqs` sequences of half the length, and one of the whole.
        chunk_tokens: most prompt tokens of a dispatch, while which nobody decodes.
        num_draft: tokens that the MTP layer drafts in a round, at most; 0 does not speculate.
        adapts_draft: draft fewer, or none, where that gives more tokens a second; more programs are compiled for it.
        grammars: serve requests with a JSON schema, a regular expression or a grammar; more programs are compiled for them.
        grammar_share: of the device's time that each sequence under a grammar may take from those who decode, in rounds of
            its own; half at most for all.
        max_rounds: most rounds of a dispatch.
        dispatch_seconds: that a dispatch of decoding should take while nobody waits; a quarter of it when somebody does.
        dispatch_ahead: dispatch the next program before the log of the last one is read.
        max_queued: requests that may wait in all.
        max_queued_per_client: requests of one client that may wait.
        ageing_seconds: that a request waits before its priority rises by one.
        prefix_cache: share pages between requests that begin alike, now and later.
        offload_bytes: of the host's memory, for pages that the prefix tree lets go of.
        load_seconds: that a request waits for pages from there, before it reads their tokens again.
        anomalies: when a request is suspicious, and what to do about it.
        faults: races made on purpose; None for none.
        recorded_dispatches: that a recording holds at least, for `Engine.record`; 0 records nothing.
        debug: check that everything adds up after every step, which waits for the device.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 16
    page_size: int = 64
    pages: int | None = None
    chunk_tokens: int = 512
    num_draft: int = 0
    adapts_draft: bool = True
    grammars: bool = False
    grammar_share: float = 0.05
    max_rounds: int = 32
    dispatch_seconds: float = 0.06
    dispatch_ahead: bool = True
    max_queued: int = 1024
    max_queued_per_client: int = 1024
    ageing_seconds: float = 10.0
    prefix_cache: bool = True
    offload_bytes: int = 0
    load_seconds: float = 2.0
    anomalies: AnomalyRules = AnomalyRules()  # noqa: RUF009 (frozen)
    faults: FaultRates | None = None
    recorded_dispatches: int = 2000
    debug: bool = False

    def __post_init__(self):
        for name in ("max_num_seqs", "page_size", "chunk_tokens", "max_rounds", "max_queued", "max_queued_per_client"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.offload_bytes < 0 or self.load_seconds < 0:
            raise ValueError(
                f"offload_bytes {self.offload_bytes} and load_seconds {self.load_seconds} must not be negative"
            )
        if self.recorded_dispatches < 0:
            raise ValueError(f"recorded_dispatches {self.recorded_dispatches} is negative; use 0 to record nothing")
        if not 0 < self.grammar_share <= 1:
            raise ValueError(f"grammar_share {self.grammar_share} is outside 0..1; give what a sequence may take")
        if self.num_draft < 0:
            raise ValueError(f"num_draft {self.num_draft} is negative; use 0 not to speculate")
        if self.chunk_tokens % self.page_size:
            raise ValueError(
                f"chunk_tokens {self.chunk_tokens} is no multiple of page_size {self.page_size}, where chunks end"
            )
