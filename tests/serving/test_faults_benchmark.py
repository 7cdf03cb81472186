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


@pytest.fixture(scope="module")
def report(glm, workload, arguments):
    for mode, made in (
        ("no faults", None),
        ("races, unversioned", dataclasses.replace(RACES, versioned=False)),
        ("races, versioned", RACES),
    ):
        faults.campaign(glm, workload, arguments, mode, dataclasses.replace(CONFIG, faults=made))
    return faults.report(glm, workload, arguments)


def test_races_make_outputs_wrong_where_nothing_is_versioned(report):
    found = report["races, unversioned"]
    assert found["wrong"] > found["ties"]
    assert all(found["counters"][name] for name in ("late_landing", "forward_before_ready", "retire_during_transfer"))


def test_no_output_is_wrong_where_everything_is(report):
    found = report["races, versioned"]
    assert found["requests"] == 300
    assert found["wrong"] == found["failed"] == 0
    assert all(found["counters"][name] for name in ("late_landing", "forward_before_ready", "retire_during_transfer"))
    assert found["counters"]["replays"]


def test_what_has_been_run_is_not_run_again(report, glm, workload, arguments, monkeypatch):
    monkeypatch.setattr(faults, "serve", pytest.fail)
    faults.campaign(glm, workload, arguments, "races, versioned", CONFIG)
    assert faults.report(glm, workload, arguments) == report


def test_a_table_has_a_line_for_each_mode(report):
    assert len(faults.table(report).splitlines()) == 1 + len(report)


def test_an_output_parts_from_its_reference_at_the_first_other_token():
    reference = faults.Outcome((1, 2, 3), "finished")
    assert faults.parting(faults.Outcome((1, 2, 3), "finished"), reference) is None
    assert faults.parting(faults.Outcome((1, 5, 3), "finished"), reference) == 1
    assert faults.parting(faults.Outcome((1, 2), "finished"), reference) == 2
    assert faults.parting(faults.Outcome((1, 2), "aborted"), reference) is None


def test_a_workload_is_always_the_same(workload):
    assert workload[17] == workload[17]
    assert workload[17] != workload[18]
