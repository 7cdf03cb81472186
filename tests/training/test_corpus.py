"""The corpus is what its docstring says, and the held-out modules never reach training."""

import hashlib
from pathlib import Path

import pytest

from glmjax.training import corpus


@pytest.fixture(scope="module")
def real():
    """The corpus of the interpreter that runs the tests."""
    return corpus.load()


@pytest.fixture
def library(tmp_path):
    """Writes a small library: path → content."""

    def write(files: dict[str, str | bytes]) -> Path:
        for path, content in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def paths(documents):
    return [document.path for document in documents]


def code(name, lines=40):
    return "".join(f"{name}_{i} = compute({name!r}, {i} + offset)\n" for i in range(lines))


def test_no_held_out_module_is_trained_on(real):
    assert {document.module for document in real.held_out} == set(corpus.HELD_OUT)
    assert not [path for path in paths(real.training) if path.split("/")[0].removesuffix(".py") in corpus.HELD_OUT]


def test_no_held_out_content_is_trained_on(real):
    def hashes(documents):
        return {hashlib.sha256(document.text.encode()).digest() for document in documents}

    assert hashes(real.held_out).isdisjoint(hashes(real.training))


def test_no_test_of_a_held_out_module_is_trained_on(real):
    names = {part.removesuffix(".py") for document in real.training for part in document.path.split("/")}
    assert names.isdisjoint({f"test_{module}" for module in corpus.HELD_OUT})


def test_no_training_document_shares_five_lines_in_a_row_with_a_held_out_one(real):
    def passages(documents):
        for document in documents:
            lines = [line.strip() for line in document.text.splitlines() if any(map(str.isalnum, line))]
            yield from ("\n".join(lines[i : i + 5]) for i in range(len(lines) - 4))

    assert set(passages(real.held_out)).isdisjoint(passages(real.training))


def test_the_held_out_part_is_three_to_four_percent_of_the_bytes(real):
    manifest = real.manifest()
    held_out, training = manifest["held_out"]["bytes"], manifest["training"]["bytes"]
    assert 0.03 < held_out / (held_out + training) < 0.04


def test_tests_are_at_most_a_third_of_the_training_bytes(real):
    manifest = real.manifest()
    assert 0.32 < manifest["training_tests"]["bytes"] / manifest["training"]["bytes"] <= 1 / 3


def test_documents_are_distinct_sorted_and_free_of_tables(real):
    trained = paths(real.training)
    assert trained == sorted(set(trained))
    assert len({document.text for document in real.training}) == len(trained)
    assert not {"pydoc_data/topics.py", "html/entities.py", "encodings/cp1252.py"} & set(trained)
    assert not [path for path in trained if path.startswith("_sysconfigdata")]
    assert {"argparse.py", "asyncio/events.py", "encodings/idna.py", "typing.py"} <= set(trained)


def test_tests_can_be_left_out(library):
    root = library({"a.py": code("a"), "test/test_a.py": code("test_a", 10)})
    assert paths(corpus.load(root).training) == ["a.py", "test/test_a.py"]
    assert paths(corpus.load(root, include_tests=False).training) == ["a.py"]
    assert paths(corpus.load(root, test_share=0.01).training) == ["a.py"]


def test_third_party_invalid_empty_and_repeated_files_are_no_documents(library):
    files = {
        "a.py": code("a"),
        "again.py": code("a"),
        "empty/__init__.py": "\n",
        "latin.py": b"name = '\xe9'\n",
        "_sysconfigdata__x.py": code("build"),
        "encodings/cp1.py": "decoding_table = (\n    'a'\n)\n",
        "table.py": "table = {\n" + "".join(f"    0x{i:x}: 'it\\'s {i}',\n" for i in range(1000)) + "}\n",
        "site-packages/b.py": code("b"),
        "data.txt": "text",
    }
    loaded = corpus.load(library(files))
    assert paths(loaded.training) == ["a.py"]
    assert loaded.left_out == {
        "build": 1, "duplicate": 1, "empty": 1, "encoding": 1, "over share": 0, "table": 2,
    }  # fmt: skip


def test_copies_and_tests_of_held_out_modules_are_left_out(library):
    held_out = code("heap")
    files = {
        "a.py": code("a"),
        "heapq.py": held_out,
        "json/decoder.py": code("decoder"),
        "vendored.py": "import this\n\nif True:\n" + "\n".join("    " + line for line in held_out.splitlines()[7:12]),
        "test/test_heapq.py": code("t", 2),
        "test/test_json/test_all.py": code("u", 2),
        "test/test_heap.py": code("v", 2),
    }
    loaded = corpus.load(library(files))
    assert paths(loaded.held_out) == ["heapq.py", "json/decoder.py"]
    assert paths(loaded.training) == ["a.py", "test/test_heap.py"]
    assert loaded.left_out["copy of held-out"] == 1
    assert loaded.left_out["test of held-out"] == 2


def test_the_manifest_tells_corpora_apart(library):
    files = {"a.py": code("a"), "b.py": code("b"), "bisect.py": code("bisect")}
    first = corpus.load(library(files)).manifest()
    assert corpus.load(library({})).manifest() == first
    assert first["training"]["files"] == 2
    assert first["training"]["bytes"] == len(files["a.py"]) + len(files["b.py"])
    changed = corpus.load(library({"b.py": code("c")})).manifest()
    assert changed["training"]["bytes"] == first["training"]["bytes"]
    assert changed["training"]["sha256"] != first["training"]["sha256"]
    assert changed["held_out"] == first["held_out"]


def test_a_digest_depends_on_where_a_path_ends():
    assert corpus.digest([corpus.Document("a", "bc")]) != corpus.digest([corpus.Document("ab", "c")])


def test_a_share_of_everything_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="test_share is 1"):
        corpus.load(test_share=1.0)
    with pytest.raises(ValueError, match="no Python source to train on"):
        corpus.load(tmp_path)
