"""When speculation is suspicious, and that it is not for ever after a false alarm."""

import pytest

from glmjax.serving.anomaly import AnomalyRules, Detector

RULES = AnomalyRules(window=8)


def after(*rounds, rules=RULES, drafts=3):
    detector = Detector(rules)
    for counts in rounds:
        detector.push(counts, drafts)
    return detector


def test_few_accepted_drafts_are_suspicious_once_there_is_enough_text():
    detector = after([1] * 6 + [2] * 2)
    assert detector.suspicion(128) is None
    assert "accept length 1.25 below 1.4 over 8 rounds" in detector.suspicion(129)


def test_the_length_must_be_below_the_limit():
    assert after([1] * 3 + [2] * 2, rules=AnomalyRules(window=5)).suspicion(1000) is None  # 1.4 exactly
    assert after([1] * 4 + [2] * 2, rules=AnomalyRules(window=6)).suspicion(1000) is not None


def test_nearly_all_drafts_accepted_is_suspicious_at_any_length():
    assert "accept rate 1.00 above 0.96" in after([4] * 8).suspicion(9)
    assert after([4] * 7 + [3]).suspicion(9) is None  # 23 of 24


def test_only_the_last_rounds_count():
    assert after([1] * 100, [3] * 8).suspicion(1000) is None
    assert after([3] * 100, [1] * 8).suspicion(1000) is not None


def test_nothing_is_suspicious_before_the_window_is_full():
    assert after([1] * 7).suspicion(1000) is None


def test_rounds_without_drafts_do_not_count():
    detector = after([2] * 8)
    detector.push([1] * 50, 0)
    assert detector.suspicion(1000) is None


def test_after_a_false_alarm_it_keeps_silent_twice_as_long_every_time():
    detector, heard = after([1] * 8), []
    for n in range(60):
        if detector.suspicion(1000):
            heard.append(n)
            detector.benign()
        detector.push([1], 3)
    assert heard == [0, 8, 24, 56]


def test_it_can_be_turned_off():
    assert after([1] * 8, rules=AnomalyRules(window=8, enabled=False)).suspicion(1000) is None
    assert after([1] * 8, rules=AnomalyRules(window=8, shortest_length=1.0)).suspicion(1000) is None
    assert after([4] * 8, rules=AnomalyRules(window=8, largest_rate=1.0)).suspicion(1000) is None


@pytest.mark.parametrize(
    "fields", [{"window": 0}, {"shortest_length": 0.9}, {"largest_rate": 1.1}, {"least_tokens": -1}]
)
def test_impossible_rules_are_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        AnomalyRules(**fields)
