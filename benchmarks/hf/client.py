"""glmjax's end of the comparison with Hugging Face: the environment that `benchmarks.hf.worker` runs in, and the talk with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0")


class WorkerError(RuntimeError):
    """Hugging Face's side cannot be had, or has failed."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A prompt read and continued by one side.

    Attributes:
        ids: the new tokens.
        first_token_seconds: from the start to the first of them.
        tokens_per_second: from the second of them to the last.
        margins: how far the best logit was above the second at each new token; empty where it is not known.
        waiting_cores: cores that the other side kept busy meanwhile, though it had nothing to do.
        foreign_cores: cores that processes of neither side kept busy meanwhile.
    """

    ids: Sequence[int]
    first_token_seconds: float
    tokens_per_second: float
    margins: Sequence[float] = ()
    waiting_cores: float = 0.0
    foreign_cores: float = 0.0


def environment(directory: Path, python: str) -> Path:
    """The interpreter of a virtual environment with `REQUIREMENTS`, which is made where it is not there yet.

    Packages come from where pip is configured to find them. Where its index has torch for CUDA, a much larger wheel, name
    one for the CPU in PIP_INDEX_URL or PIP_FIND_LINKS.

    Args:
        directory: of the environment; replaced if it was not finished or was made for other requirements.
        python: the interpreter to make it with, a name or a path.

    Raises:
        FileNotFoundError: there is no such interpreter.
        WorkerError: the environment cannot be made.
    """
    inside, ready, wanted = directory / "bin" / "python", directory / "ready", "\n".join(REQUIREMENTS)
    if ready.is_file() and ready.read_text() == wanted and inside.exists():
        return inside
    found = shutil.which(python)
    if found is None:
        raise FileNotFoundError(f"there is no {python}; install Python 3.11, or name an interpreter with --python")
    print(f"making {directory} with {', '.join(REQUIREMENTS)} …", file=sys.stderr)
    for command in (
        [found, "-m", "venv", "--clear", str(directory)],
        [str(inside), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS],
    ):
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise WorkerError(
                f"{' '.join(command)} failed, as told above; name another Python (3.11 is known to work) with --python"
            )
    ready.write_text(wanted)
    return inside


class Worker:
    """A worker process under way; leaving the context ends it.

    Args:
        command: what to start; it speaks as `benchmarks.hf.worker` does.

    Attributes:
        greeting: what it said of itself.
        pid: of its process.

    Raises:
        WorkerError: here or later, it ended or said what is no JSON object.
    """

    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.pid = self._process.pid
        try:
            self.greeting = self._heard()
        except BaseException:
            self._end(kill=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(kill=kind is not None)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Run:
        """Have a prompt continued; nothing else should run meanwhile."""
        assert self._process.stdin is not None
        request = {"prompt": [int(token) for token in prompt], "new_tokens": new_tokens}
        with contextlib.suppress(BrokenPipeError):  # it has ended; `_heard` says how
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return Run(**self._heard())

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the worker ended with status {self._process.wait()}; its reasons are above")
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise WorkerError(f"the worker said {line!r}, which is no JSON object; only answers belong on its output")
        return said

    def _end(self, *, kill: bool) -> None:
        if kill:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # leaving it closes its input, at whose end it stops
            pass
