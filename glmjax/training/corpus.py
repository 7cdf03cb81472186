"""The corpus: the Python source of the running interpreter's standard library.

Every machine that can run glmjax already has it, it is real code by many hands, and its licence is plain: the Python
Software Foundation License Version 2 (`LICENSE.txt` in the library folder; a few modules carry their own notices in
their headers, which stay in the text). Nothing is downloaded, and nothing of it is stored in this project but what was
learned from it: the vocabulary and the weights.

What is a document: one `.py` file, as its UTF-8 text, unchanged. What is not, in this order:

  third party   `site-packages`, `dist-packages`, `__pycache__`
  build         `_sysconfigdata*.py` and `config-*/`: written when this interpreter was compiled, other on each machine
  encoding      not valid UTF-8 (a handful of test inputs)
  empty         nothing but white space (package markers)
  table         literals with no code around them: `encodings/` modules with a charmap (`decoding_table` and the like),
                and any file of at least 10,000 bytes of which half or more are lines that hold only literals, such as
                `pydoc_data/topics.py`, `html/entities.py`, `locale.py`
  duplicate     the same bytes as an earlier path
  test of held-out, copy of held-out
                what would leak the held-out modules into training: `test_<module>*` anywhere in the path, and any file
                that shares five consecutive lines (blank ones and pure punctuation aside) with a held-out document
  over share    tests beyond `test_share`

The library proper is always used. Its tests are more text than it but poorer in variety, so they fill up at most
`test_share` of the training bytes, taken in the order of the SHA-256 of their paths, which is as good as random and the
same everywhere.
"""

import hashlib
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LICENCE = "PSF-2.0"

HELD_OUT = (
    "bisect",
    "calendar",
    "configparser",
    "copy",
    "csv",
    "difflib",
    "fnmatch",
    "fractions",
    "glob",
    "graphlib",
    "heapq",
    "json",
    "pprint",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "string",
    "textwrap",
    "tomllib",
)
"""Top-level modules and packages that are never trained on: well known, diverse, and without a twin in the library
(`decimal` or `datetime` would have one)."""

SHARED_RUN = 5
"""This many consecutive lines in common with a held-out document make a file a copy."""

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_THIRD_PARTY = frozenset({"site-packages", "dist-packages", "__pycache__"})
_CHARMAP = re.compile(r"^(decoding|encoding)_(table|map)\b", re.MULTILINE)
_WORD = re.compile(r"[^\W_]")
_STRING = r"""[rbu]*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LITERAL_LINE = re.compile(rf"[\[({{]?\s*(?:(?:0x[0-9a-fA-F]+|-?[\d.]+|{_STRING})\s*[:,)\]]|{_STRING}\s*(?:\#|$))")
"""Matches the start of a line, without its indentation, that holds literals: an entry of a table, or a string."""


@dataclass(frozen=True)
class Document:
    """One source file.

    Attributes:
      path: relative to the library's folder, with forward slashes, for example `json/decoder.py`.
      text: its content, unchanged.
    """

    path: str
    text: str

    @property
    def module(self) -> str:
        """The top-level module or package that the file belongs to: `json` for `json/decoder.py`."""
        return self.path.split("/", 1)[0].removesuffix(".py")

    @property
    def is_test(self) -> bool:
        """Whether it is in one of the library's test packages."""
        return not _TEST_FOLDERS.isdisjoint(PurePosixPath(self.path).parts[:-1])

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8: the denominator of bits per byte."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """What to train on and what never to, both in order of path.

    Attributes:
      training: the documents of the training set.
      held_out: every document of the modules in `HELD_OUT`.
      left_out: how many files were left out, by reason (the module's docstring lists them).
    """

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]
    left_out: dict[str, int]

    def manifest(self) -> dict:
        """What a run must record to be repeated: the Python version, the licence, and counts and digests of each part."""
        return {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "licence": LICENCE,
            "training": _summary(self.training),
            "training_tests": _summary([document for document in self.training if document.is_test]),
            "held_out": _summary(self.held_out) | {"modules": list(HELD_OUT)},
            "left_out": dict(self.left_out),
        }


def load(root: Path | None = None, *, include_tests: bool = True, test_share: float = 1 / 3) -> Corpus:
    """Reads the corpus, about 14 MB, in one to two seconds.

    Args:
      root: the library's folder; by default that of the running interpreter.
      include_tests: whether its tests may be trained on as well.
      test_share: the largest share of the training bytes that may come from tests, in [0, 1).

    Raises:
      ValueError: `test_share` is outside its range, or there is no source below `root`.
    """
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share is {test_share}; give the tests' share of the training bytes, in [0, 1)")
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    left_out: Counter[str] = Counter()
    documents = list(_read(root, left_out))
    held_out = tuple(document for document in documents if document.module in HELD_OUT)
    held_out_runs = {run for document in held_out for run in _line_runs(document.text)}
    library: list[Document] = []
    tests: list[Document] = []
    for document in documents:
        if document.module in HELD_OUT:
            continue
        if _tests_held_out(document.path):
            left_out["test of held-out"] += 1
        elif not held_out_runs.isdisjoint(_line_runs(document.text)):
            left_out["copy of held-out"] += 1
        else:
            (tests if document.is_test else library).append(document)
    if not library:
        raise ValueError(f"no Python source to train on below {root}; give the folder of a standard library")
    budget = sum(document.num_bytes for document in library) * test_share / (1 - test_share) if include_tests else 0.0
    chosen = _within(budget, tests)
    left_out["over share"] = len(tests) - len(chosen)
    training = tuple(sorted(library + chosen, key=lambda document: document.path))
    return Corpus(training, held_out, dict(left_out))


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 over every document's path and content, in order, each preceded by its length in bytes."""
    state = hashlib.sha256()
    for document in documents:
        for part in (document.path.encode(), document.text.encode()):
            state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


def _read(root: Path, left_out: Counter[str]) -> Iterator[Document]:
    """Every file that is a document, in order of path, whatever it will be used for."""
    seen: set[bytes] = set()
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    for path in paths:
        if not _THIRD_PARTY.isdisjoint(path.split("/")):
            continue  # not part of the library: not counted either
        content = (root / path).read_bytes()
        reason = _why_not(path, content)
        if reason is None and hashlib.sha256(content).digest() in seen:
            reason = "duplicate"
        if reason is not None:
            left_out[reason] += 1
            continue
        seen.add(hashlib.sha256(content).digest())
        yield Document(path, content.decode())


def _why_not(path: str, content: bytes) -> str | None:
    """The reason why a file is not a document, judged by itself."""
    if path.startswith(("_sysconfigdata", "config-")):
        return "build"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "encoding"
    if not text.strip():
        return "empty"
    if path.startswith("encodings/") and _CHARMAP.search(text):
        return "table"
    if len(content) >= 10_000:
        lines = [line.strip() for line in text.splitlines()]
        literal = sum(len(line) for line in lines if _LITERAL_LINE.match(line))
        if 2 * literal >= sum(map(len, lines)):
            return "table"
    return None


def _tests_held_out(path: str) -> bool:
    """Whether some part of the path is named `test_<module>` or `test_<module>_…` after a held-out module."""
    names = [part.removesuffix(".py") for part in path.split("/")]
    return any(name == f"test_{module}" or name.startswith(f"test_{module}_") for name in names for module in HELD_OUT)


def _line_runs(text: str) -> Iterator[int]:
    """Hashes of all runs of `SHARED_RUN` consecutive lines that have a letter or a digit, indentation ignored."""
    lines = [line for line in map(str.strip, text.splitlines()) if _WORD.search(line)]
    return map(hash, zip(*(lines[i:] for i in range(SHARED_RUN)), strict=False))


def _within(budget: float, documents: list[Document]) -> list[Document]:
    """Documents of at most `budget` bytes together, those that fit in the order of the SHA-256 of their paths."""
    chosen = []
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.path.encode()).digest()):
        if document.num_bytes <= budget:
            budget -= document.num_bytes
            chosen.append(document)
    return chosen


def _summary(documents: Iterable[Document]) -> dict:
    documents = list(documents)
    size = sum(document.num_bytes for document in documents)
    return {"files": len(documents), "bytes": size, "sha256": digest(documents)}
