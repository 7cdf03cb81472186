"""What is counted as accepted."""

import numpy as np
import pytest

from glmjax.evaluation import drafts
from glmjax.evaluation.drafts import Acceptance, Drafts, acceptance, pieces
from glmjax.evaluation.loops import WINDOW
from glmjax.evaluation.rollout import Continued

PROMPT, NEW, DRAFTS = 24, 20, 2
SHAPE = {"prompt_tokens": PROMPT, "new_tokens": NEW, "num_draft": DRAFTS, "sequences": 2}


# Counting


def varied(length):
    return list(range(length))


def test_shares_by_position():
    found = acceptance([Continued(varied(7), [1, 3, 2]), Continued(varied(5), [3, 1])], 2, 100)
    assert found == Acceptance(rounds=5, accepted=(3, 2), tokens=10, looping=0)
    assert found.accept_length == 2.0
    assert found.shares == (0.6, 0.4)
    assert found.conditional == (0.6, pytest.approx(2 / 3))


def test_rounds_from_a_loop_on_do_not_count():
    ids = [*varied(10), *[99] * 60]  # the first token is of no round
    found = acceptance([Continued(ids, [3] * 23)], 2, 100)
    assert found == Acceptance(rounds=3, accepted=(3, 3), tokens=9, looping=1)


def test_tokens_that_only_tell_loops_do_not_count():
    counts = [2] * 30
    assert acceptance([Continued(varied(61), counts)], 2, 21).tokens == 20
    assert acceptance([Continued([*varied(13), *[99] * 48], counts)], 2, 13) == acceptance(
        [Continued(varied(61), counts)], 2, 13
    )


def test_a_round_that_runs_past_a_stop_token_does_not_count():
    found = acceptance([Continued(varied(3), [1, 3])], 2, 100)  # a stop token is the third
    assert found == Acceptance(rounds=1, accepted=(0, 0), tokens=1, looping=0)


def test_without_a_round_there_are_no_shares():
    found = acceptance([Continued([7] * 60, [59])], 2, 100)
    assert (found.looping, found.accept_length, found.shares) == (1, None, (None, None))


# Prompts


def test_prompts_are_pieces_that_something_follows_spread_over_the_texts():
    texts = [np.arange(25), np.arange(100, 110), np.arange(200, 231)]
    assert [piece[0] for piece in pieces(texts, 10, 9)] == [0, 10, 200, 210, 220]
    assert [piece[0] for piece in pieces(texts, 10, 2)] == [0, 200]
    assert all(len(piece) == 10 for piece in pieces(texts, 10, 9))


# Reporting


def test_the_report_has_both_ways_of_sampling(directory, file, monkeypatch):
    asked = []

    def continued(glm, prompts, params, new_tokens, num_draft):
        asked.append((glm.tokenizer.decode(prompts[1].tolist()), params.temperature, new_tokens, num_draft))
        return [Continued(varied(7), [1, 3, 2])] * len(prompts)

    monkeypatch.setattr(drafts, "continued", continued)
    report = Drafts(directory, prompts=(file, file), **SHAPE).run()
    beginning = file.read_text()[:PROMPT]
    assert asked == [(beginning, temperature, NEW + WINDOW, DRAFTS) for temperature in (0, 1)]
    assert report.text.startswith("2 prompts of 24 tokens, 20 new tokens of each\n")
    assert "\ngreedy: 2.00 tokens per verify step; 0 of 2 sequences loop\n" in report.text
    assert "\ntemperature 1: 2.00 tokens" in report.text
    found = report.numbers["temperature_1"]
    assert found["accept_length"] == 1 + sum(found["accepted"]) / found["rounds"]
    assert "\ntemperature 1, the same text: rejection sampling would emit 1." in report.text
    assert report.numbers["coupling"]["observed"]["after_accepted"] == (2 / 3, 1 / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_draft": 0}, "must be at least 1"),
        ({"new_tokens": 500}, "574 in all, exceed the model's context of 512"),
        ({"prompts": "short"}, "no text has more than 24 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(directory, file, tmp_path, arguments, message):
    (tmp_path / "short").write_text("short")
    chosen = SHAPE | arguments | {"prompts": (tmp_path / "short" if "prompts" in arguments else file,)}
    with pytest.raises(ValueError, match=message):
        Drafts(directory, **chosen).run()


def test_a_checkpoint_without_an_mtp_layer_is_refused(without_mtp, file):
    with pytest.raises(ValueError, match="has no MTP weights"):
        Drafts(without_mtp, prompts=(file,), **SHAPE).run()
