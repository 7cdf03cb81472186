"""Tables are aligned."""

from glmjax.evaluation.report import percent, table


def test_the_first_column_is_aligned_left_and_the_others_right():
    text = table([("", "bits", "x"), ("a model", "1.5", "–"), ("b", "12.25", "100")])
    assert text.splitlines() == ["          bits    x", "a model    1.5    –", "b        12.25  100"]


def test_shares_are_percentages_and_nothing_is_a_dash():
    assert [percent(0.1234), percent(1.0), percent(None)] == ["12.3 %", "100.0 %", "–"]
