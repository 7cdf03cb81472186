"""The benchmark of decode steps, at a size for a test."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import decode
from glmjax.model.config import GlmConfig

TINY = GlmConfig.from_dir(Path(__file__).parent / "tiny.json")
ARGUMENTS = decode.Arguments(contexts=(16, 48), steps=4, repeats=1, read_mib=1)


def test_every_context_has_its_row():
    title, units, *rows, last = decode.run(TINY, ARGUMENTS).splitlines()
    assert len(title) == len(units) == len(rows[0]) == len(rows[1])
    assert [row.split()[0] for row in rows] == ["16", "48"]
    assert rows[0].split()[2] == "1.00"
    assert all(float(number) >= 0 for row in rows for number in row.split())
    assert last.startswith("memory reads")


@pytest.mark.parametrize("contexts", [(3, 16), (16, TINY.max_position_embeddings + 1)])
def test_contexts_that_do_not_fit_are_refused(contexts):
    with pytest.raises(ValueError, match=r"must be from 4 .* leave out"):
        decode.run(TINY, dataclasses.replace(ARGUMENTS, contexts=contexts))
