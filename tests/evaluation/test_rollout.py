"""What is rolled out is the model's own text, and the record adds up to it."""

import numpy as np
import pytest

from glmjax.evaluation.arguments import encode, read
from glmjax.evaluation.rollout import continued
from glmjax.model.sampling_params import SamplingParams

PROMPT, NEW, DRAFTS = 24, 20, 2


@pytest.fixture(scope="module")
def prompts(glm, file):
    (text,) = encode(glm, read([file]))
    return [text[begin : begin + PROMPT] for begin in (0, 30, 70)]


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(temperature=4, seed=5)], ids=["greedy", "sampled"]
)
def test_the_text_is_that_of_token_by_token_generation(glm, prompts, params):
    found = continued(glm, prompts, params, NEW, DRAFTS)
    for b, (sequence, prompt) in enumerate(zip(found, prompts, strict=True)):
        seed = None if params.seed is None else params.seed + b
        wanted = glm.generate(prompt, params, seed=seed, max_new_tokens=NEW).finish()
        assert sequence.ids[:NEW] == wanted.ids
        assert len(sequence.ids) <= 1 + sum(sequence.counts)
        assert (len(sequence.ids) >= NEW) == (wanted.finish_reason == "length")
    rounds = np.concatenate([sequence.counts for sequence in found])
    assert rounds.min() >= 1
    assert rounds.max() <= DRAFTS + 1
