"""Blanks: how a prompt is written, where the text that fills it ends, and what is refused."""

import pytest

import glmjax
from glmjax.model.infill import BlankTokens
from glmjax.model.tokenizer import Tokenizer
from glmjax.nano import NANO

BLANKS = BlankTokens(mask=1, gmask=2, sop=3, eop=4)


@pytest.fixture(scope="module")
def glm():
    return glmjax.load()


def test_a_blank_within_a_text_is_a_mask_and_the_middle_comes_last():
    assert BLANKS.prompt([10, 11], [12]) == [10, 11, 1, 12, 3]
    assert BLANKS.prompt([], [12]) == [1, 12, 3]


def test_a_blank_at_the_end_is_another_mask():
    assert BLANKS.prompt([10, 11], []) == [10, 11, 2, 3]


def test_the_tokens_are_those_of_the_vocabulary():
    tokenizer = Tokenizer.from_dir(NANO)
    names = ("[MASK]", "[gMASK]", "<sop>", "<eop>")
    assert list(BlankTokens.of(tokenizer)) == [tokenizer.token_id(name) for name in names]


def test_filling_a_blank_is_generating_behind_its_prompt(glm):
    filled = glm.infill("def f(x):\n    return ", "\n", temperature=0, max_new_tokens=8).finish()
    encoded = [glm.encode(text) for text in ("def f(x):\n    return ", "\n")]
    prompt = BlankTokens.of(glm.tokenizer).prompt(*encoded)
    assert filled.prompt_ids == prompt
    assert glm.generate(prompt, temperature=0, max_new_tokens=8).finish().ids[: len(filled.ids)] == filled.ids


def test_the_text_of_a_blank_ends_where_the_model_says(glm):
    eop = BlankTokens.of(glm.tokenizer).eop
    filled = glm.infill("a", "b", temperature=0, max_new_tokens=8, logit_bias={eop: 1000.0}).finish()
    assert (filled.ids, filled.text, filled.finish_reason) == ([eop], "", "stop")


def test_stops_of_ones_own_hold_too(glm):
    own = glm.infill("a", "b", temperature=0, max_new_tokens=8, logit_bias={7: 1000.0}, stop_token_ids=(7,)).finish()
    assert (own.ids, own.finish_reason) == ([7], "stop")


def test_a_model_without_a_tokenizer_fills_nothing(glm):
    with pytest.raises(ValueError, match="without a tokenizer"):
        glmjax.GLM(glm.weights, None, None, glm.stops).infill("a", "b")
