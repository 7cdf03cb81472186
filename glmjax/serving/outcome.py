"""What logs mean: tokens for clients, sequences that are over, faults, and suspicions."""

from __future__ import annotations

import jax
import numpy as np

from glmjax.model.sampling import Logprobs
from glmjax.serving.config import EngineConfig
from glmjax.serving.errors import AnomalyError, GrammarError, UnavailableError
from glmjax.serving.pages import OK
from glmjax.serving.plan import Plan
from glmjax.serving.programs import Log
from glmjax.serving.request import Request
from glmjax.serving.running import Running
from glmjax.serving.sequence import Leaving, Sequence
from glmjax.serving.stream import Chunk, Score

MOST_REPLAYS = 3
"""Times that a request may lose its pages to faults before it fails."""
MOST_RESTARTS = 1
"""Times that a request may begin anew, unseen, because its output was garbled, before it fails: another replica may do better."""


class Outcome:
    """Reads logs.

    Args:
        running: who waits and runs.
        config: the engine's.
        tolerance: by how much another token may be ahead of the one that was emitted, logits and noise together: what
            programs of different shapes differ by.
    """

    def __init__(self, running: Running, config: EngineConfig, tolerance: float):
        self._running, self._rules, self._tolerance = running, config.anomalies, tolerance
        self._num_draft = config.num_draft

    def read(self, plan: Plan, log: Log, now: float) -> None:
        """What a dispatch did, told to those it was for.

        Args:
            plan: that was dispatched.
            log: of it, on the host.
            now: `time.monotonic()`.
        """
        self._running.counts["dispatches"] += 1
        told = zip(log.tokens_BS.tolist(), log.count_ZB[: log.rounds].T.tolist(), strict=True)
        for b, (sequence, (tokens, counts)) in enumerate(zip(plan.sequences, told, strict=False)):
            sequence.unread -= 1
            sequence.promised -= plan.promised[b]
            if sequence.leaving not in (None, Leaving.PREEMPTED):
                continue  # nobody wants what may still come
            if log.fault_B[b] != OK:
                self._replay(sequence, now)
            else:
                counts = [count for count in counts if count]
                self._progress(plan, log, b, tokens[: sum(counts)], counts, now)

    def _progress(self, plan: Plan, log: Log, b: int, tokens: list[int], counts: list[int], now: float) -> None:
        """A sequence got tokens, so many in each round that gave any."""
        sequence, running = plan.sequences[b], self._running
        request, drafts = sequence.request, plan.shape.width - 1
        if plan.chunks is not None:
            begin, read = int(plan.chunks.begin_B[b]), int(plan.chunks.count_B[b])
            sequence.rows = begin + read
            running.keep(sequence)
            _capture(request, log, b, begin, read)
            _score_prompt(request, log, b, begin, read)
        else:
            sequence.rows = max(sequence.rows, int(log.position_B[b]))
        if not tokens:
            return
        request.began = now if request.began is None else request.began
        for sibling in request.siblings:  # they find the prompt's pages in the tree
            running.waiting.push_back(sibling)
        request.siblings.clear()

        if (matcher := request.reply.matcher) is not None and matcher.error:
            running.end(request, now, GrammarError(f"the grammar is too complex: {matcher.error}; simplify it"))
            return
        known = min(len(tokens), len(sequence.expected) - sequence.confirmed)
        if known and not self._confirmed(sequence, log.gap_BS[b, :known], now):
            return
        if matcher is not None and not known and plan.guesses is not None:
            running.counts["forced"] += min(len(tokens), int((plan.guesses.guess_BT[b] >= 0).sum()))
        decoded = plan.shape.kind == "decode"
        if decoded:  # before its last chunk, which tells the statistics
            self._count_rounds(sequence, counts, drafts)
        if self._emit(sequence, log, b, tokens, known, now, decoded=plan.chunks is None):
            sequence.leaving = Leaving.DONE
        elif decoded:
            if drafts == self._num_draft:
                request.detector.push(counts, drafts)
            if (reason := request.detector.suspicion(len(request.reply.ids))) is not None:
                self._suspect(sequence, reason, now)

    def _emit(
        self, sequence: Sequence, log: Log, b: int, tokens: list[int], begin: int, now: float, *, decoded: bool
    ) -> bool:
        """Tokens to the client, those from `begin` on; whether they were the last."""
        request, counts, ids, text = sequence.request, self._running.counts, [], ""
        reply = request.reply
        for token in tokens[begin:]:
            ids.append(token)
            text += reply.push(token)
            if reply.finish_reason:
                break
        if not ids:
            return False
        if decoded:  # what these tokens were made of, and not what may follow a stop string
            _capture(request, log, b, int(log.position_B[b]) - len(tokens), begin + len(ids))
        counts["new_tokens"] += len(ids)
        counts["finished"] += reply.finish_reason is not None
        scores, wanted = (), request.params.logprobs
        if wanted is not None:
            scores = tuple(_score(log.scores_BS, b, begin + s, wanted) for s in range(len(ids)))
        end, statistics = reply.finish_reason, request.statistics(now)
        request.stream.put(Chunk(tuple(ids), text, request.index, scores, end, reply.matched, statistics))
        return reply.finish_reason is not None

    def _count_rounds(self, sequence: Sequence, counts: list[int], drafts: int) -> None:
        """What was drafted and accepted in rounds that gave so many tokens each."""
        request, totals = sequence.request, self._running.counts
        found = {"rounds": len(counts), "drafted": drafts * len(counts), "accepted": sum(counts) - len(counts)}
        for name, count in found.items():
            setattr(request, name, getattr(request, name) + count)
            totals[name] += count
        accepted = [sum(count > n + 1 for count in counts) for n in range(drafts)]
        for acceptance in (request.acceptance, self._running.acceptance):
            acceptance.push(accepted, len(counts))
        for n, hits in enumerate(accepted):
            totals["accepted", n] += hits
            totals["drafted", n] += len(counts)

    def _replay(self, sequence: Sequence, now: float) -> None:
        """A fault has taken a sequence's pages: read it again on others."""
        request = sequence.request
        request.replays += 1
        request.loads = False
        self._running.counts["replays"] += 1
        sequence.leaving = Leaving.REPLAYED
        if request.replays > MOST_REPLAYS:
            text = f"the request's pages were lost {request.replays} times; send it to another replica"
            self._running.end(request, now, UnavailableError(text))

    # Suspicions

    def _suspect(self, sequence: Sequence, reason: str, now: float) -> None:
        """Confirm a suspicion, or act on it where the rules say so."""
        self._running.counts["suspicions"] += 1
        sequence.request.reason = reason
        if self._rules.confirm:
            self._running.suspect(sequence)
        else:
            self._abort(sequence, len(sequence.request.reply.ids), now)

    def _confirmed(self, sequence: Sequence, gap_S: np.ndarray, now: float) -> bool:
        """Whether tokens that had been emitted come again; that of the last of them clears the request."""
        request = sequence.request
        wrong = np.flatnonzero(~(gap_S <= self._tolerance))  # NaN is wrong, too
        if len(wrong):
            self._garbled(sequence, sequence.confirmed + int(wrong[0]), now)
            return False
        sequence.confirmed += len(gap_S)
        if not sequence.confirming:
            self._running.counts["benign"] += 1
            request.detector.benign()
            request.suspects = frozenset()
        return True

    def _garbled(self, sequence: Sequence, good: int, now: float) -> None:
        """The pages held what they should not: so may those who shared them, and what was emitted is wrong."""
        request, running = sequence.request, self._running
        for other in running.sequences:
            if other.leaving is None and not other.expected and request.suspects.intersection(other.leases):
                other.request.reason = "it shared pages with a garbled one"
                running.suspect(other)
        request.suspects = frozenset()
        unseen = request.stream.take_back(request.index)
        if unseen and request.restarts < MOST_RESTARTS:
            running.counts["restarts"] += 1
            request.restarts += 1
            request.restart()
            sequence.leaving = Leaving.REPLAYED
        else:
            self._abort(sequence, 0 if unseen else good, now)

    def _abort(self, sequence: Sequence, good: int, now: float) -> None:
        self._running.counts["aborts"] += 1
        self._running.end(sequence.request, now, AnomalyError(sequence.request.reason, good))


def _capture(request: Request, log: Log, b: int, begin: int, count: int) -> None:
    """What hooks have captured of tokens to the client, if it is wanted.

    Args:
        request: whose.
        log: of the dispatch.
        b: its row.
        begin: position of the first token that was read.
        count: of tokens.
    """
    if request.hook and log.captured_BS:
        captured = jax.tree.map(lambda leaf_BS: leaf_BS[b, :count], log.captured_BS)
        request.stream.capture(request.index, begin, captured)


def _score_prompt(request: Request, log: Log, b: int, begin: int, read: int) -> None:
    """Logprobs of the prompt, as far as they are wanted and not known yet; to the client with the first token."""
    if request.scoring:
        known, wanted = len(request.prompt_scores), request.params.prompt_logprobs
        end = min(begin + read, len(request.prompt) - 1)
        request.prompt_scores += [_score(log.targets_BT, b, t - begin, wanted) for t in range(known, end)]
        if not request.scoring:
            request.stream.score_prompt(request.prompt_scores)


def _score(scores: Logprobs, b: int, s: int, most: int) -> Score:
    top = zip(scores.top_ids_BU[b, s, :most].tolist(), scores.top_BU[b, s, :most].tolist(), strict=True)
    return Score(float(scores.emitted_B[b, s]), int(scores.rank_B[b, s]), tuple(top))
