"""The trees that the documents draw are the tree."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = tuple((ROOT / "glmjax").rglob("*.py"))


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_every_file_of_the_package_has_its_line(document):
    words = (ROOT / document).read_text(encoding="utf-8").split("The tree")[1].split()
    files = {file.name for file in (*PACKAGE, *(ROOT / "benchmarks").glob("*.py")) if file.stat().st_size > 200}
    assert files - set(words) <= {"__init__.py"}


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_no_line_names_a_file_that_is_gone(document):
    tree = (ROOT / document).read_text(encoding="utf-8").split("## The tree")[1].split("## ")[0]
    named = {word for word in tree.split() if word.endswith(".py") and "/" not in word}
    assert named <= {file.name for file in (*PACKAGE, *(ROOT / "benchmarks").rglob("*.py"))}
