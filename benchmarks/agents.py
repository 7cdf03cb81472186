"""``python -m benchmarks.agents``: what the prefix cache is worth to coding agents.

An agent's task is several calls. All begin with the same system prompt; each call's prompt is the one before, the
model's reply to it and what a tool answered, so that most of a prompt has been read before. Sessions work on tasks at the
same time, each waiting for its reply and for its tool (a closed loop). The same tasks are run with the prefix cache and
without, by turns, and so is a session that is alone, whose first tokens wait for nobody else's. Every turn begins with
nothing cached: its requests have a salt of their own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tyro

import glmjax
from benchmarks.agents_report import Call, Measured, Pair, Turn, report
from benchmarks.measure import machine
from glmjax.glm import GLM
from glmjax.serving.config import EngineConfig
from glmjax.serving.engine import Engine


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Coding agents on the engine, with the prefix cache and without.

    Attributes:
        model_path: directory of a checkpoint; default the model in the box.
        sessions: agents at work at the same time.
        tasks: of all of them together, in a turn.
        calls: of a task.
        system_tokens: that all tasks begin with.
        task_tokens: that are a task's own, in its first prompt.
        tool_tokens: that a tool answers between two calls.
        new_tokens: of every reply.
        think_seconds: mean time from a reply to the next call; it is drawn from an exponential distribution.
        turns: how often everything is run.
        alone: tasks of the session that is alone, in a turn; 0 leaves it out.
        bucket: prompts are grouped by length; the last group's lengths span so many tokens, and every other's.
        num_draft: drafts a round.
        max_model_len: most tokens of a sequence; the fewer, the fewer programs are compiled.
        page_size: rows of a page.
        pages: of the cache; default enough for one and a half sequences of each session.
        chunk_tokens: most prompt tokens of a dispatch.
        seed: of the tasks.
    """

    model_path: Path | None = None
    sessions: int = 4
    tasks: int = 4
    calls: int = 9
    system_tokens: int = 1024
    task_tokens: int = 704
    tool_tokens: int = 256
    new_tokens: int = 32
    think_seconds: float = 0.25
    turns: int = 2
    alone: int = 1
    bucket: int = 576
    num_draft: int = 0
    max_model_len: int = 4096
    page_size: int = 64
    pages: int | None = None
    chunk_tokens: int = 512
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of a task's last prompt."""
        grown = (self.calls - 1) * (self.new_tokens + self.tool_tokens)
        return self.system_tokens + self.task_tokens + grown


@dataclasses.dataclass(frozen=True)
class Task:
    """What an agent sends.

    Attributes:
        beginning: the first prompt.
        answers: what the tool says before each other call.
        thinks: seconds before each of those.
    """

    beginning: list[int]
    answers: list[list[int]]
    thinks: list[float]


def tasks_of(arguments: Arguments, vocab: int) -> list[Task]:
    """The tasks of a turn, the same ones at every call.

    Args:
        arguments: how many and how long.
        vocab: tokens to draw from.
    """
    rng = np.random.default_rng(arguments.seed)

    def text(length: int) -> list[int]:
        return rng.integers(0, vocab, length).tolist()

    system, more = text(arguments.system_tokens), arguments.calls - 1
    return [
        Task(
            beginning=system + text(arguments.task_tokens),
            answers=[text(arguments.tool_tokens) for _ in range(more)],
            thinks=rng.exponential(arguments.think_seconds, more).tolist(),
        )
        for _ in range(arguments.tasks)
    ]


async def call(engine: Engine, prompt: Sequence[int], new_tokens: int, salt: int | None) -> Call:
    """One call.

    Args:
        engine: runs it.
        prompt: its tokens.
        new_tokens: of the reply.
        salt: of the prefix cache; None does without it.
    """
    began, used = time.perf_counter(), time.process_time()
    asked = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens}
    first, ids = (), []
    async for chunk in engine.generate(prompt, cache_salt=salt, use_cache=salt is not None, **asked):
        first = first or (time.perf_counter() - began, time.process_time() - used)
        ids += chunk.ids
    return Call(len(prompt), chunk.statistics.cached_tokens, *first, tuple(ids))


async def work(
    engine: Engine, tasks: Iterator[Task], new_tokens: int, salt: int | None, thinks: bool
) -> list[list[Call]]:
    """A session: takes one task after the other from those that are left.

    Args:
        engine: runs the calls.
        tasks: shared with the other sessions.
        new_tokens: of every reply.
        salt: see `call`.
        thinks: whether there is time between calls.
    """
    done = []
    for task in tasks:
        prompt = task.beginning
        calls = [await call(engine, prompt, new_tokens, salt)]
        for answer, seconds in zip(task.answers, task.thinks, strict=True):
            await asyncio.sleep(seconds if thinks else 0)
            prompt = [*prompt, *calls[-1].ids, *answer]
            calls.append(await call(engine, prompt, new_tokens, salt))
        done.append(calls)
    return done


def measure(glm: GLM, arguments: Arguments) -> Measured:
    """Run everything.

    Raises:
        ValueError: a task's last call is longer than a sequence can be, or there is nothing to do.
    """
    if min(arguments.sessions, arguments.tasks, arguments.calls, arguments.new_tokens, arguments.turns) < 1:
        raise ValueError("--sessions, --tasks, --calls, --new-tokens and --turns must be at least 1")
    if arguments.longest + arguments.new_tokens > arguments.max_model_len:
        raise ValueError(
            f"a task's last prompt of {arguments.longest} tokens and its reply do not fit max_model_len "
            f"{arguments.max_model_len}; ask for fewer --calls, or fewer of the tokens"
        )
    tasks = tasks_of(arguments, glm.tokenizer.vocab_size if glm.tokenizer else glm.config.vocab_size)
    salts = itertools.count()
    per_sequence = -(-arguments.max_model_len // arguments.page_size)
    config = EngineConfig(
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.sessions,
        page_size=arguments.page_size,
        pages=arguments.pages or -(-3 * arguments.sessions * per_sequence // 2),
        chunk_tokens=arguments.chunk_tokens,
        num_draft=arguments.num_draft,
    )
    with Engine(glm, config, progress=True) as engine:

        def turn(sessions: int, tasks: list[Task], cached: bool) -> Turn:
            async def all_sessions() -> list[list[list[Call]]]:
                left, salt = iter(tasks), next(salts) if cached else None
                each = (work(engine, left, arguments.new_tokens, salt, sessions > 1) for _ in range(sessions))
                return await asyncio.gather(*each)

            began, used = time.perf_counter(), time.process_time()
            done = asyncio.run(all_sessions())
            return Turn(
                [task for session in done for task in session], time.perf_counter() - began, time.process_time() - used
            )

        def pair(n: int, sessions: int, tasks: list[Task]) -> Pair:
            """In another order every other turn."""
            found = {cached: turn(sessions, tasks, cached) for cached in (n % 2 == 0, n % 2 == 1)}
            return Pair(found[True], found[False])

        engine.generate(tasks[0].beginning, temperature=0, max_new_tokens=2, use_cache=False).finish()
        alone = [pair(n, 1, tasks[: arguments.alone]) for n in range(arguments.turns) if arguments.alone]
        together = [pair(n, arguments.sessions, tasks) for n in range(arguments.turns)]
    return Measured(together, alone, arguments.sessions)


def main(arguments: Arguments) -> None:
    """Measure and print."""
    glm = glmjax.load(arguments.model_path) if arguments.model_path else glmjax.load()
    print(report(measure(glm, arguments), arguments.bucket))
    print(machine())


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.agents"))
