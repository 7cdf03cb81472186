"""The benchmark of agents, at a size for a test: its numbers agree with each other and with the tasks."""

import dataclasses

import pytest

from benchmarks.agents import Arguments, measure, tasks_of
from benchmarks.agents_report import Call, Pair, Turn, by_length, report
from tests.serving.tiny import tiny

ARGUMENTS = Arguments(
    sessions=2,
    tasks=3,
    calls=3,
    system_tokens=17,
    task_tokens=6,
    tool_tokens=5,
    new_tokens=4,
    think_seconds=0.001,
    turns=1,
    bucket=9,
    max_model_len=48,
    page_size=8,
    chunk_tokens=16,
)
LENGTHS = [23, 32, 41]


@pytest.fixture(scope="module")
def measured():
    return measure(tiny(), ARGUMENTS)


def test_every_task_is_run_with_the_cache_and_without(measured):
    for pairs, tasks in ((measured.together, 3), (measured.alone, 1)):
        (pair,) = pairs
        for turn in (pair.cached, pair.fresh):
            assert [[call.prompt_tokens for call in task] for task in turn.tasks] == [LENGTHS] * tasks
            assert all(len(call.ids) == 4 and call.first_seconds > 0 for call in turn.calls)
            assert turn.seconds > sum(call.first_seconds for call in turn.tasks[0])
            assert turn.tasks_per_hour > 0
            assert turn.cpu_per_task > 0


def test_only_the_cached_turns_hit(measured):
    for pair in measured.together + measured.alone:
        assert pair.fresh.hit_rate == 0
        assert 0 < pair.cached.hit_rate < 1
        for task in pair.cached.tasks:  # what has rows before a call: all before it but the newest token
            assert [call.cached_tokens for call in task][1:] == [(before + 4 - 1) // 8 * 8 for before in LENGTHS[:-1]]


def test_a_turn_begins_with_nothing_cached(measured):
    assert measured.alone[0].cached.tasks[0][0].cached_tokens == 0
    assert sorted(task[0].cached_tokens for task in measured.together[0].cached.tasks)[0] == 0
    assert max(task[0].cached_tokens for task in measured.together[0].cached.tasks) == 16  # of the system prompt


def test_replies_are_the_same_with_the_cache_and_without(measured):
    for pair in measured.together + measured.alone:
        cached, fresh = (
            sorted([call.ids for call in task] for task in turn.tasks) for turn in (pair.cached, pair.fresh)
        )
        assert cached == fresh


def test_tasks_share_the_system_prompt_and_come_again():
    tasks = tasks_of(ARGUMENTS, 16)
    assert tasks == tasks_of(ARGUMENTS, 16)
    assert tasks != tasks_of(dataclasses.replace(ARGUMENTS, seed=1), 16)
    assert len({tuple(task.beginning[:17]) for task in tasks}) == 1
    assert len({tuple(task.beginning) for task in tasks}) == 3
    assert [len(tasks[0].beginning) + sum(map(len, tasks[0].answers)) + 2 * 4] == [ARGUMENTS.longest] == [LENGTHS[-1]]


def test_calls_are_grouped_by_the_length_of_the_prompt():
    def turn(seconds):
        return Turn([[Call(length, 0, seconds * length, 0.0, ()) for length in (10, 15, 25, 35)]], 1.0, 1.0)

    found = by_length([Pair(turn(1.0), turn(2.0))] * 2, 15)
    times = [[[call.first_seconds for call in calls] for calls in group] for group in found]
    assert times == [[[10, 15] * 2, [20, 30] * 2], [[25, 35] * 2, [50, 70] * 2]]


def test_the_report_has_a_line_for_each_length_and_the_totals(measured):
    lines = report(measured, ARGUMENTS.bucket).splitlines()
    assert lines[0] == "one session alone, 3 calls; seconds to the first token"
    assert [line.split()[:2] for line in lines[2:5]] == [["23", "1"], ["32", "1"], ["41", "1"]]
    assert [line.split()[0] for line in lines[6:9]] == ["cached", "fresh", "ratio"]
    assert lines[10] == "2 sessions, 9 calls; seconds to the first token"
    assert lines[17].split()[-1] == "0.0%"
    assert len({len(line) for line in lines[1:5]}) == len({len(line) for line in lines[11:15]}) == 1


@pytest.mark.parametrize(
    ("fields", "message"), [({"calls": 5}, "59 tokens and its reply"), ({"tasks": 0}, "at least 1")]
)
def test_what_cannot_be_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        measure(tiny(), dataclasses.replace(ARGUMENTS, **fields))
