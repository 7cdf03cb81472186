"""The engine: many requests at once on one model, from any thread or event loop.

One thread plans, dispatches and reads logs; nobody else touches the cache. It dispatches the next program before it
reads the log of the last one, so that the device does not wait for the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.glm import GLM, Prompt
from glmjax.model.sampling_params import SamplingParams
from glmjax.serving.compiled import Programs
from glmjax.serving.config import EngineConfig
from glmjax.serving.drafting import Acceptance
from glmjax.serving.errors import ClosedError, UnavailableError
from glmjax.serving.events import CacheEvents, EventBatch
from glmjax.serving.faults import Faults
from glmjax.serving.hooks import Hooks
from glmjax.serving.offload import Move, Offload
from glmjax.serving.outcome import Outcome
from glmjax.serving.pages import PagedCache
from glmjax.serving.plan import Plan
from glmjax.serving.programs import Log
from glmjax.serving.recorder import Flight, Recorder
from glmjax.serving.request import Request
from glmjax.serving.running import MOST_RETIRED, Running
from glmjax.serving.scheduler import STOP_IDS, Scheduler
from glmjax.serving.shapes import Shapes
from glmjax.serving.slots import Slots
from glmjax.serving.stats import EngineMemory, EngineStats
from glmjax.serving.stream import Stream

_COUNTED = (
    *("dispatches", "finished", "prompt_tokens", "cached_tokens", "new_tokens"),
    *("rounds", "drafted", "accepted", "forced", "preemptions", "replays"),
    *("suspicions", "benign", "restarts", "aborts", "landed", "dropped"),
)


_TOLERANCE, _ROUNDED = 1e-4, 0.1
"""What programs of different shapes may differ by in logits: in float32, and where anything is narrower."""
_LONGEST_SLEEP = 0.05
"""Seconds, while something is to be done and cannot be: deadlines are looked at afterwards."""
_LOG = logging.getLogger(__name__)


Observer = Callable[[Plan, Log, Callable[[], EngineStats]], None]
"""Takes a plan, its log on the host, and what gives the engine's statistics."""


class Engine:
    """Serves a model.

        with Engine(glmjax.load()) as engine:
            stream = engine.generate("def fibonacci(n):", temperature=0, max_new_tokens=64)
            for chunk in stream:                          # or: async for chunk in stream
                print(chunk.text, end="", flush=True)

    Making one compiles all programs it will ever run. `close`, or leaving the ``with`` block, ends it.

    Args:
        glm: the model.
        config: sizes and limits.
        progress: whether to show a bar while programs are compiled.
        hooks: what researchers look at or change in layers, of requests that choose it; None for nothing.
        observer: is told, in the engine's thread, of every dispatch whose log has been read; None for nobody.

    Attributes:
        shapes: of its programs.
        events: what comes into the prefix tree and leaves it.

    Raises:
        ValueError: the configuration does not fit the model, which may be unable to follow grammars.
    """

    def __init__(
        self,
        glm: GLM,
        config: EngineConfig | None = None,
        *,
        progress: bool = False,
        hooks: Hooks | None = None,
        observer: Observer | None = None,
    ):
        self.glm, self.config, self.hooks, self._observer = glm, config or EngineConfig(), hooks, observer
        self.max_model_len = self._checked_length()
        per_sequence = -(-self.max_model_len // self.config.page_size)
        self.pages = self.config.pages or per_sequence * (self.config.max_num_seqs + 1) // 2 + per_sequence
        if self.pages < per_sequence:
            raise ValueError(
                f"{self.pages} pages of {self.config.page_size} rows do not hold one sequence of max_model_len "
                f"{self.max_model_len}; give at least {per_sequence}, or a smaller max_model_len"
            )
        if self.config.num_draft and glm.weights.mtp is None:
            raise ValueError(f"num_draft is {self.config.num_draft} and the model has no MTP layer; set it to 0")
        if self.config.grammars:
            _ = glm.grammars  # refuses models that cannot follow any, and takes a while
        self.shapes = Shapes(self.config, self.max_model_len, glm.config.vocab_size)
        self._faults, self._offload = Faults(self.config.faults), None
        if self.config.offload_bytes:
            size = self.config.page_size
            self._offload = Offload(self.config.offload_bytes, size, self._faults, self._wake)
        self.events = CacheEvents()
        self._running = Running(self.config, self.pages, self._offload, self._faults, self.events)
        self._recorder = Recorder(self.pages, self.config.recorded_dispatches)
        self._scheduler = Scheduler(self.config, self.shapes, self._running)
        exact = glm.weights.dtype == glm.kv_cache_dtype == jnp.float32
        self._outcome = Outcome(self._running, self.config, _TOLERANCE if exact else _ROUNDED)
        self._commands: deque[Callable[[float], None]] = deque()
        self._changed = threading.Condition()
        self._closing = self._stuck = False
        self._turning: float | None = None
        self._make_state()
        self._programs = Programs(
            glm.weights,
            most_rounds=self.config.max_rounds,
            most_retired=MOST_RETIRED,
            stop_ids=STOP_IDS,
            hooks=hooks,
        )
        self._programs.compile(
            self.shapes, self._cache, self._slots, offloads=self._offload is not None, progress=progress
        )
        self._unread: deque[tuple[Plan, Flight, Any, float]] = deque()
        self._landed: list[tuple[int, Any]] = []
        self._last_log = self._device_seconds = self._host_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="glmjax-engine", daemon=True)
        self._thread.start()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        client: Hashable = None,
        timeout: float | None = None,
        cache_salt: Hashable = None,
        use_cache: bool = True,
        holdback: float | int = 0,
        hook: int = 0,
        template: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Stream:
        """Begin to generate; the stream gives tokens as they come.

        Args:
            prompt: text, token ids, or chat messages, to which the checkpoint's template is applied.
            params: how to sample and when to stop.
            n: sequences to generate; the seeds of the others follow that of the first.
            priority: the lower, the sooner.
            client: who asks: those who wait are served in turn.
            timeout: seconds after which it is not worth going on.
            cache_salt: only requests of the same salt share cached prefixes.
            use_cache: whether to use cached prefixes and leave some; never without `EngineConfig.prefix_cache`.
            holdback: tokens of each sequence that the stream keeps back until there are more, or it has ended; `math.inf` for
                all. As long as nothing has been read of a sequence, an anomaly in it can be mended unseen.
            hook: a number other than 0 has the engine's hooks look at the request, and tells the patch its treatment.
                What is captured comes with `Stream.captures`. What is cached is not read, so not captured: turn
                `use_cache` off to capture all. Under a patch, only requests of one number share cached prefixes.
            template: arguments for the chat template.
            **fields: fields of `SamplingParams`, instead of or over those of `params`.

        Raises:
            ValueError: bad parameters, an empty prompt, an id outside the vocabulary, more tokens than fit, a grammar that
                cannot be followed, in llguidance's words, or any where `EngineConfig.grammars` is off.
            QueueFullError: too many requests wait.
            ClosedError: the engine has been closed.
        """
        if n < 1:
            raise ValueError(f"n {n} must be at least 1")
        if hook and self.hooks is None:
            raise ValueError(f"hook is {hook!r} and the engine has no hooks; make it with Engine(…, hooks=Hooks(…))")
        asked = self.glm.asked(prompt, params, template=template, limit=self.max_model_len, **fields)
        if asked.matcher is not None and not self.config.grammars:
            raise ValueError(
                f"{asked.params.constraint} is given and grammars are off; set EngineConfig(grammars=True)"
            )
        now = time.monotonic()
        stream = Stream(n, lambda: self._command(cancel), holdback)
        first = asked.params.seed or 0
        requests = [
            Request(
                prompt=asked.ids,
                params=dataclasses.replace(
                    asked.params,
                    seed=(first + i) % 2**32,
                    prompt_logprobs=None if i else asked.params.prompt_logprobs,  # those of all
                ),
                new_tokens=asked.new_tokens,
                stops=asked.stops,
                tokenizer=self.glm.tokenizer,
                matcher=asked.matcher,
                stream=stream,
                index=i,
                client=client,
                priority=priority,
                deadline=None if timeout is None else now + timeout,
                namespace=self.hooks.namespace(cache_salt, int(hook)) if self.hooks else cache_salt,
                reuse=use_cache and self.config.prefix_cache,
                hook=int(hook),
                arrived=now,
                rules=self.config.anomalies,
                acceptance=Acceptance(self._running.acceptance),
            )
            for i in range(n)
        ]

        def cancel(now: float) -> None:
            for request in requests:
                self._running.end(request, now)

        requests[0].siblings += requests[1:]
        self._running.waiting.reserve(client)
        self._command(lambda now: self._running.add(requests[0]))
        return stream

    def stats(self) -> EngineStats:
        """What it has done so far, and what is going on now."""
        counts = self._running.counts
        return EngineStats(
            running=len(self._running.sequences),
            waiting=len(self._running.waiting),
            pages=self.pages,
            free_pages=self._running.pool.free + self._running.pool.retiring,
            cached_pages=len(self._running.tree),
            held_pages=len({lease for sequence in [*self._running.sequences] for lease in [*sequence.leases]}),
            device_seconds=self._device_seconds,
            host_seconds=self._host_seconds,
            programs=len(self._programs),
            offloaded_pages=0 if self._offload is None else len(self._offload),
            corrupt=0 if self._offload is None else self._offload.corrupt,
            faults=dict(self._faults.made),
            drafted_at=tuple(counts["drafted", n] for n in range(self.config.num_draft)),
            accepted_at=tuple(counts["accepted", n] for n in range(self.config.num_draft)),
            **{name: counts[name] for name in _COUNTED},
        )

    def memory(self) -> EngineMemory:
        """What it takes of the device's memory."""
        weights, cache = (sum(leaf.nbytes for leaf in jax.tree.leaves(t)) for t in (self.glm.weights, self._cache))
        return EngineMemory(weights, cache, max(self._programs.temporary_bytes().values()))

    @property
    def alive(self) -> bool:
        """Whether its thread runs: until it is closed, or cannot go on."""
        return self._thread.is_alive()

    @property
    def stalled_seconds(self) -> float:
        """For how long its thread has been busy with a single step: a program that does not end, if that is long."""
        began = self._turning
        return 0.0 if began is None else time.monotonic() - began

    def record(self, path: Path | str) -> None:
        """Save what was dispatched lately, for ``python -m glmjax.serving.replay``.

        Args:
            path: of the file.

        Raises:
            ValueError: nothing is recorded (`EngineConfig.recorded_dispatches`).
            ClosedError: the engine has been closed.
        """
        if not self.config.recorded_dispatches:
            raise ValueError("recorded_dispatches is 0: nothing is recorded; set it when the engine is made")
        header = {
            "page_size": self.config.page_size,
            "max_pages": -(-self.max_model_len // self.config.page_size),
            "max_num_seqs": self.config.max_num_seqs,
            "max_rounds": self.config.max_rounds,
            "chunk_tokens": self.config.chunk_tokens,
            "words": self.shapes.words,
            "most_retired": MOST_RETIRED,
            "stop_ids": STOP_IDS,
            "dtype": jnp.dtype(self.glm.weights.dtype).name,
            "kv_cache_dtype": jnp.dtype(self.glm.kv_cache_dtype).name,
            "versioned": self._faults.versioned,
            "hooks": self.hooks is not None,
        }
        self._asked(lambda: self._recorder.save(Path(path), header))

    def cached(self) -> tuple[EventBatch, ...]:
        """What is in the prefix tree now, as events; those that follow them are `events.after` the last number.

        Raises:
            ClosedError: the engine has been closed.
        """
        return self._asked(lambda: self.events.everything(self._running.tree))

    def flush(self) -> bool:
        """Let go of all cached pages, unless requests wait or run; whether that was so.

        Raises:
            ClosedError: the engine has been closed.
        """
        return self._asked(self._running.flush)

    def close(self) -> None:
        """End: requests that are not finished fail as unavailable, and the cache is let go."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.events.close()
        if self._offload is not None:
            self._offload.close()
        self._cache = self._slots = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _checked_length(self) -> int:
        context = self.glm.config.max_position_embeddings
        length = self.config.max_model_len or context
        if not 0 < length <= context:
            raise ValueError(f"max_model_len {length} is outside 1..{context}, the model's context")
        return length

    def _make_state(self) -> None:
        weights, config = self.glm.weights, self.glm.config
        self._cache = PagedCache.create(
            config,
            self.pages,
            self.config.page_size,
            self.glm.kv_cache_dtype,
            tail_dtype=weights.dtype,
            mtp=weights.mtp is not None,
            versioned=self._faults.versioned,
        )
        self._slots = Slots.create(self.config.max_num_seqs, config.hidden_size, config.vocab_size, weights.dtype)

    def _command(self, command: Callable[[float], None]) -> None:
        """Have the engine's thread do something before its next plan.

        Raises:
            ClosedError: it has ended.
        """
        with self._changed:
            if self._closing:
                raise ClosedError("the engine is closed; make another")
            self._commands.append(command)
            self._changed.notify_all()

    def _asked[T](self, question: Callable[[], T]) -> T:
        """What the engine's thread answers, before its next plan.

        Raises:
            ClosedError: it has ended.
        """
        answer: Future[T] = Future()

        def reply(_: float) -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        self._command(reply)
        return answer.result()

    def _wake(self) -> None:
        """Something that the engine's thread may be waiting for has happened."""
        with self._changed:
            self._stuck = False
            self._changed.notify_all()

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # out of memory, a bug: whatever it is, nobody may wait for ever
                    _LOG.exception("a step of the engine failed; running requests are lost")
                    try:
                        self._recover(error)
                    except Exception:  # there is no memory for a new cache, for one
                        _LOG.critical("the engine cannot begin again; it ends", exc_info=True)
                        return
            while self._unread:
                self._read()
        finally:
            with self._changed:
                self._closing = True
            for command in self._commands:  # of those who asked before they could know
                with contextlib.suppress(Exception):
                    command(time.monotonic())
            text = "the engine was closed before the request was finished; send it to another replica"
            self._running.drop(UnavailableError(text), waiting=True)

    def _wait(self) -> bool:
        """Until there is something to do; whether to go on."""
        with self._changed:
            timeout = _LONGEST_SLEEP if self._stuck else None
            self._changed.wait_for(
                lambda: self._commands or self._closing or self._unread or (self._running.busy and not self._stuck),
                timeout,
            )
            return bool(self._commands) or not self._closing

    def _turn(self) -> None:
        """Do what others have asked for, and a step."""
        busy, now = time.thread_time(), time.monotonic()
        self._turning = now
        while self._commands:
            self._commands.popleft()(now)
        self._step(now)
        self._host_seconds += time.thread_time() - busy
        self._turning = None

    def _recover(self, error: Exception) -> None:
        """Begin again with an empty cache: a program that failed has taken the old one with it."""
        lost = UnavailableError(f"the engine failed ({type(error).__name__}: {error}); send the request again")
        lost.__cause__ = error
        self._turning = None
        self._unread.clear()
        self._landed.clear()
        self._recorder.begin()
        self._running.drop(lost)
        self._make_state()

    def _step(self, now: float) -> None:
        self._stuck = True  # unless there is something to do, or somebody wakes it meanwhile
        plan = self._scheduler.plan(now)
        if plan is not None:
            self._dispatch(plan)
        if plan is not None or self._unread:
            self._stuck = False
        ahead = int(self.config.dispatch_ahead and plan is not None)
        while len(self._unread) > ahead:
            self._read()
        self.events.publish()
        self._recorder.turn(self._running)
        if self.config.debug:
            self._running.check()

    def _dispatch(self, plan: Plan) -> None:
        tokens = self.glm.tokenizer.vocab_size if self.glm.tokenizer else None
        for admission in plan.admitted:
            sampling = admission.sampling(self.glm.config.vocab_size, tokens)
            self._slots = self._programs.admit(self._slots, admission.slot, admission.generation, sampling)
        flight = self._recorder.dispatched(plan)
        for move in plan.moves:
            self._move(move)
        self._cache, self._slots, log = self._programs.dispatch(plan, self._cache, self._slots)
        if log is not None:
            self._unread.append((plan, flight, log, time.monotonic()))

    def _move(self, move: Move) -> None:
        """Pages to the host's memory, or from there."""
        if not move.pages:
            for piece, records, ok_Z in self._programs.collect(self._cache, move):
                self._offload.collected(piece, records, ok_Z)
        else:
            self._cache, landed = self._programs.land(self._cache, move)
            self._landed += landed  # told with the next log

    def _read(self) -> None:
        plan, flight, log, dispatched = self._unread.popleft()
        # What nobody wants stays on the device.
        if not plan.batch.scored:
            log = dataclasses.replace(log, scores_BS=None)
        if plan.chunks is None or not (plan.chunks.target_BT >= 0).any():
            log = dataclasses.replace(log, targets_BT=None)
        if not any(sequence.request.hook for sequence in plan.sequences):
            log = dataclasses.replace(log, captured_BS={})
        log, landed, self._landed = jax.tree.map(np.asarray, log), self._landed, []
        self._recorder.read(flight, log)
        now = time.monotonic()
        seconds = now - max(dispatched, self._last_log)
        self._last_log = now
        self._device_seconds += seconds
        self._scheduler.learn(plan, log, seconds)
        for count, ok_Z in landed:
            written = int(np.asarray(ok_Z)[:count].sum())
            self._running.counts["landed"] += written
            self._running.counts["dropped"] += count - written
        self._outcome.read(plan, log, now)
        if self._observer is not None:
            self._observer(plan, log, self.stats)
