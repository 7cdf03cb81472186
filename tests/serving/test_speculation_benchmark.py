"""The benchmark of drafts by task: what is asked, and what is told of it."""

import contextlib

import numpy as np
import pytest

import glmjax
from benchmarks import speculation

ARGUMENTS = speculation.Arguments(prompts=3, context=64, temperatures=(0.0, 1.0), repeats=3)


@pytest.fixture(scope="module")
def glm():
    return glmjax.load()


@pytest.fixture(scope="module")
def texts():
    return [np.random.default_rng(n).integers(0, 500, 300) for n in range(2)]


@pytest.mark.parametrize("task", speculation.TASKS)
def test_a_tasks_prompts_are_always_the_same_and_about_as_long(task, glm, texts):
    asked = speculation.prompts_of(task, glm, texts, 5, 64)
    assert asked == speculation.prompts_of(task, glm, texts, 5, 64)
    assert len(asked) == 5
    assert all(64 <= len(one.ids) <= 66 for one in asked)


def test_a_repetition_repeats_itself(glm, texts):
    for one in speculation.prompts_of("repetition", glm, texts, 5, 64):
        assert any(one.ids[n:] == one.ids[:-n] for n in range(8, 24))


def test_a_filled_blank_ends(glm, texts):
    assert all(one.stops for one in speculation.prompts_of("infill", glm, texts, 2, 64))


def test_texts_must_be_long_enough(glm, texts):
    with pytest.raises(ValueError, match="give longer files"):
        speculation.prompts_of("code", glm, texts, 1, 200)


def test_gains_are_over_no_drafts_within_a_turn(glm, texts, monkeypatch):
    turns = {(0, True): iter([1, 100, 200, 400] * 6), (3, False): iter([9, 50, 300, 800] * 6)}

    def speed(config, asked, temperature, new_tokens):
        drafts = config.num_draft, config.adapts_draft
        return (next(turns[drafts]) if drafts in turns else 100.0), 1.5, 0.5

    monkeypatch.setattr(speculation, "Engine", lambda glm, config, progress: contextlib.nullcontext(config))
    monkeypatch.setattr(speculation, "speed", speed)
    *_, last, note = speculation.run(glm, texts, ARGUMENTS).splitlines()
    assert last.split() == ["infill", "1.0", "200", "300", "1.50×", "1.50", "100", "0.50×", "1.50", "0.50"]
    assert "3 turns" in note
