"""How near a token was to being another one: ties, certainties, and what the sampler itself says."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glmjax.evaluation.margins import ahead, margins
from glmjax.glm import GLM
from glmjax.model.sampling import gumbel_noise
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import Stops
from tests.serving.tiny import CONFIG, tiny

GREEDY = SamplingParams(temperature=0)
K = CONFIG.index_topk
SHORT, LONG = [3, 1, 4, 1, 5], [n * n % 13 for n in range(3 * K)]


def changed(**values):
    """The tiny model with some of its weights replaced by what a function makes of them."""
    model = nnx.merge(*nnx.split(tiny().weights))
    for path, new in values.items():
        weight = model
        for name in path.split("__"):
            weight = getattr(weight, name)
        weight.values.set_value(new(weight.values[...]))
    return GLM(model, None, None, Stops())


def two_best(scores_V):
    second, first = np.sort(np.asarray(scores_V))[-2:]
    return first - second


# Ahead


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([5.0, 1.0, 3.0, 2.0], 1, 2.0),
        ([5.0, 1.0, 3.0, 2.0], 2, 1.0),
        ([5.0, 3.0, 3.0, 2.0], 2, 0.0),
        ([5.0, 1.0, 3.0, 2.0], 4, np.inf),
        ([5.0, -np.inf, 3.0, -np.inf], 2, np.inf),
        ([5.0, -np.inf, 3.0, -np.inf], 3, np.inf),
        ([5.0, -np.inf, 3.0, -np.inf], 1, 2.0),
    ],
)
def test_the_last_chosen_is_ahead_of_the_first_left_out(scores, k, expected):
    assert float(ahead(jnp.array([scores]), k)[0]) == expected


def test_a_tie_by_rule_is_settled():
    scores = jnp.array([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [2.0, 3.0, 2.0], [0.0, 3.0, 2.0]])
    assert ahead(scores, 2, settled=0.0).tolist() == [np.inf, np.inf, 0.0, 2.0]


# The token


def test_a_greedy_token_is_ahead_by_the_difference_of_logits():
    emitted = [2, 7]
    logits_V = tiny().forward([SHORT + emitted]).logits_BTV[0, -1]
    assert margins(tiny(), SHORT, GREEDY, emitted).token == pytest.approx(two_best(logits_V), abs=1e-5)


def test_a_sampled_token_is_ahead_with_its_noise():
    params = SamplingParams(temperature=0.5, seed=9)
    logits_V = np.asarray(tiny().forward([SHORT]).logits_BTV[0, -1])
    noise_V = gumbel_noise(jnp.uint32([9]), jnp.int32([len(SHORT)]), len(logits_V))[0]
    assert margins(tiny(), SHORT, params, []).token == pytest.approx(two_best(logits_V / 0.5 + noise_V), abs=1e-5)


def test_penalties_count_what_was_emitted_and_not_the_prompt():
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    emitted = [2, 7, 7]
    logits_V = np.array(tiny().forward([SHORT + emitted]).logits_BTV[0, -1])
    logits_V[[2, 7]] -= 2, 4
    assert margins(tiny(), SHORT, params, emitted).token == pytest.approx(two_best(logits_V), abs=1e-5)


def test_two_tokens_with_one_embedding_tie():
    glm = changed(head_VD=lambda head_VD: head_VD.at[3].set(head_VD[8]))
    assert margins(glm, SHORT, SamplingParams(temperature=0, logit_bias={3: 50, 8: 50}), []).token == 0


def test_the_only_token_left_is_certain():
    assert margins(tiny(), SHORT, SamplingParams(top_k=1, seed=0), []).token == np.inf


# What attention reads


def test_nothing_is_close_where_everything_visible_is_selected():
    assert margins(tiny(), LONG[:K], GREEDY, []).selection == np.inf
    assert margins(tiny(), LONG[: K - 1], GREEDY, [2]).selection == np.inf
    assert 0 < margins(tiny(), LONG[:K], GREEDY, [2]).selection < np.inf


def test_rows_that_no_head_looks_at_are_read_by_rule():
    glm = changed(indexer__k_norm_LJ=jnp.zeros_like, indexer__k_norm_bias_LJ=jnp.zeros_like)
    assert margins(glm, LONG, GREEDY, []).selection == np.inf


def test_scores_that_are_twice_as_far_apart_are_twice_as_far_apart():
    glm = changed(indexer__head_weights_LID=lambda weights: 2 * weights)
    once, twice = (margins(which, LONG[: K + 1], GREEDY, []).selection for which in (tiny(), glm))
    assert twice == pytest.approx(2 * once, rel=1e-3)


# Experts


def test_experts_that_score_the_same_tie():
    glm = changed(experts__router_LED=jnp.zeros_like)
    assert margins(glm, SHORT, GREEDY, []).router == 0


def test_a_bias_decides():
    glm = changed(experts__router_bias_LE=lambda bias_LE: bias_LE.at[:, :2].add(10))
    assert 9 < margins(glm, SHORT, GREEDY, []).router < 11


def test_what_was_close_before_is_told_apart():
    near = margins(tiny(), LONG, GREEDY, [])
    assert near.least == min(near.token, near.selection, near.router)
    each = [margins(tiny(), LONG[:n], GREEDY, []) for n in range(1, len(LONG))]
    closest = [min(of.selection, of.router) for of in each]
    assert near.earlier == pytest.approx(min(closest), abs=1e-5)
    assert near.earlier_position == int(np.argmin(closest))
    assert margins(tiny(), LONG[:1], GREEDY, []).earlier == np.inf


def test_no_prompt_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        margins(tiny(), [], GREEDY, [])
