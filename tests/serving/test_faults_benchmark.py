"""The fault campaign, small: races that make outputs wrong without versions, and none with."""

import dataclasses

import numpy as np
import pytest

from benchmarks import faults
from benchmarks.fault_workload import Workload
from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.faults import FaultRates
from tests.serving.tiny import OFFLOADING, tiny

RACES = FaultRates(late_landing=0.2, forward_before_ready=0.2, retire_during_transfer=0.2)
CONFIG = dataclasses.replace(OFFLOADING, anomalies=AnomalyRules(enabled=False))


@pytest.fixture(scope="module")
def glm():
    """Attends to everything: index scores of random weights are often both zero, and every choice would be a tie."""
    return tiny(index_topk=CONFIG.max_model_len)


@pytest.fixture(scope="module")
def workload(glm):
    texts = [np.random.default_rng(n).integers(0, 16, 200) for n in range(3)]
    return Workload(glm, texts, documents=8, length=24, new_tokens=(4, 12))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return faults.Arguments(requests=300, piece=150, results=tmp_path_factory.mktemp("faults"), inflight=4)


CONFIGS = {
    "no faults": CONFIG,
    "races, unversioned": dataclasses.replace(CONFIG, faults=dataclasses.replace(RACES, versioned=False)),
    "races, versioned": dataclasses.replace(CONFIG, faults=RACES),
}


@pytest.fixture(scope="module")
def report(glm, workload, arguments):
    """Of a campaign that was interrupted after a piece of some modes."""
    some = {mode: CONFIGS[mode] for mode in list(CONFIGS)[:2]}
    faults.campaign(glm, workload, dataclasses.replace(arguments, requests=150), some)
    faults.campaign(glm, workload, arguments, CONFIGS)
    return faults.report(arguments, CONFIGS)


def test_races_make_outputs_wrong_where_nothing_is_versioned(report):
    found = report["races, unversioned"]
    assert found.requests == 300
    assert found.wrong > found.ties
    assert found.wrong_per_10000 == pytest.approx(found.wrong / 0.03)
    assert all(found.counters[name] for name in ("late_landing", "forward_before_ready", "retire_during_transfer"))


def test_no_output_is_wrong_where_everything_is(report):
    found = report["races, versioned"]
    assert found.requests == 300
    assert found.wrong == found.failed == 0
    assert all(found.counters[name] for name in ("late_landing", "forward_before_ready", "retire_during_transfer"))
    assert found.counters["replays"]


def test_what_has_been_run_is_not_run_again(report, glm, workload, arguments, monkeypatch):
    monkeypatch.setattr(faults, "Engine", pytest.fail)
    faults.campaign(glm, workload, arguments, CONFIGS)
    assert faults.report(arguments, CONFIGS) == report


def test_what_was_run_otherwise_is_not_added(report, arguments):
    """By other requests, or with another detector."""
    looking = {mode: dataclasses.replace(config, anomalies=AnomalyRules()) for mode, config in CONFIGS.items()}
    with pytest.raises(ValueError, match="give another --results"):
        faults.report(arguments, looking)
    with pytest.raises(ValueError, match="give another --results"):
        faults.report(dataclasses.replace(arguments, pages=17), CONFIGS)


def test_a_table_has_a_line_for_each_mode(report):
    lines = faults.table(report).splitlines()
    assert [line[:30].strip() for line in lines[1:-1]] == list(report)


def test_what_was_aborted_is_judged_by_what_it_had_sent(glm, workload):
    asked, right = [workload[n] for n in range(4)], tuple(range(8))
    reference = [faults.Outcome(right, "finished")] * 4
    outcomes = [
        reference[0],
        faults.Outcome(right[:5], "aborted"),
        faults.Outcome((*right[:5], 9, 9), "aborted"),
        faults.Outcome((), "failed"),
    ]
    tally = faults.judge(glm, asked, outcomes, reference)
    assert (tally.wrong, tally.aborted, tally.aborted_wrong, tally.failed, tally.late) == (0, 2, 1, 1, (2,))


def test_an_output_parts_from_its_reference_at_the_first_other_token():
    reference = faults.Outcome((1, 2, 3), "finished")
    assert faults.parting(faults.Outcome((1, 2, 3), "finished"), reference) is None
    assert faults.parting(faults.Outcome((1, 5, 3), "finished"), reference) == 1
    assert faults.parting(faults.Outcome((1, 2), "finished"), reference) == 2
    assert faults.parting(faults.Outcome((1, 2), "aborted"), reference) is None


def test_a_workload_is_always_the_same(workload):
    assert workload[17] == workload[17]
    assert workload[17] != workload[18]
