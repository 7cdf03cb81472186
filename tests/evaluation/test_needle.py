"""Lines are planted where they should be, and an answer counts where greedy decoding gives it."""

import re

import numpy as np
import pytest

from glmjax.evaluation.arguments import encode, read
from glmjax.evaluation.needle import Haystack, Needle, Retrieved, Trial, retrieved

DISTANCES = (5, 40)


@pytest.fixture(scope="module")
def haystack(glm, file):
    return Haystack(glm.tokenizer, encode(glm, read([file])))


@pytest.fixture(params=DISTANCES)
def trial(request, haystack):
    return haystack.trial(np.random.default_rng(0), request.param), request.param


def test_a_planted_line_is_asked_for_after_the_distance(trial, glm):
    row, distance = trial
    text = glm.tokenizer.decode(row.ids.tolist())
    line, answer = (glm.tokenizer.decode(row.ids[part].tolist()) for part in (row.line, row.answer))
    name, value = re.fullmatch(r'(\w+) = "(\w+)"\n', line).groups()
    assert answer == f'{value}"\n'
    assert text.endswith(f'\nassert {name} == "{answer}')
    before, between = text[: row.line.start], text[row.line.stop :].removesuffix(f'assert {name} == "{answer}')
    assert before.endswith("\n")
    assert between.endswith("\n")
    assert distance <= len(between) < distance + 64
    assert text.count(value) == 2


def test_the_rest_is_the_text_unchanged(trial, glm, file):
    row, _ = trial
    rest = np.concatenate([row.ids[: row.line.start], row.ids[row.line.stop : row.answer.start]])
    rest = glm.tokenizer.decode(rest.tolist())
    assert rest[: rest.rindex("assert")] in file.read_text()


def test_rows_of_a_distance_are_equally_long_and_all_different(haystack):
    rng = np.random.default_rng(0)
    rows = [haystack.trial(rng, 40).ids for _ in range(8)]
    assert {len(row) for row in rows} == {232}
    assert len({row.tobytes() for row in rows}) == 8


def test_an_answer_counts_where_greedy_decoding_gives_it(glm):
    prompt = list(range(10, 30))
    answer = glm.generate(prompt, temperature=0, max_new_tokens=3, ignore_eos=True).finish().ids
    assert all(token < 98 for token in answer)
    wrong = [[(a + (i == place)) % 98 for i, a in enumerate(answer)] for place in range(3)]
    rows = [Trial(np.array(prompt + ids, np.int32), slice(2, 6), slice(20, 23)) for ids in (answer, *wrong)]
    rows.append(Trial(rows[1].ids, slice(2, 6), slice(21, 23)))
    shorter = Trial(rows[-2].ids, slice(2, 6), slice(20, 22))  # the wrong token is none of the answer
    found = retrieved(glm.weights, [*rows[:4], shorter])
    np.testing.assert_array_equal(found.right, [True, False, False, False, True])


def test_the_lines_selected_share_is_that_of_the_forwards_trace(glm):
    row = Trial(np.random.default_rng(1).integers(4, 98, 40).astype(np.int32), slice(3, 20), slice(36, 40))
    read = np.concatenate([layer[0, 35] for layer in glm.forward([row.ids], trace=True).trace.selected])
    found = retrieved(glm.weights, [row])
    assert isinstance(found, Retrieved)
    assert found.selected[0] == pytest.approx(np.isin(np.arange(3, 20), read).mean())
    assert 0 < found.selected[0] < 1


def test_the_report_has_a_line_for_each_distance(directory, file):
    report = Needle(directory, distances=DISTANCES, trials=2, filler=(file,)).run()
    assert [line.split()[0] for line in report.text.splitlines()] == ["2", "distance", "5", "40"]
    assert [of["distance"] for of in report.numbers["distances"]] == [5, 40]
    assert report.numbers["distances"][0]["retrieved"] == 0  # random weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"distances": (40, 400)},
            "rows of 592 tokens, beyond the model's context of 512; set --distances to at most 320",
        ),
        ({"distances": ()}, "must be at least 1"),
        ({"trials": 0}, "must be at least 1"),
        ({"filler": "short"}, "needs a text of more than 296 tokens, the longest has 5; give longer files"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(directory, file, tmp_path, arguments, message):
    (tmp_path / "short").write_text("short")
    chosen = {"distances": (40,), "trials": 1, "filler": (file,)} | arguments
    if arguments.get("filler"):
        chosen["filler"] = (tmp_path / "short",)
    with pytest.raises(ValueError, match=message):
        Needle(directory, **chosen).run()
