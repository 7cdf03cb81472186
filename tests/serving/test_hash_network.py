"""The network of the tests does what its oracle says, on the contiguous cache: what it is good for starts there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.model.cache import ContiguousCache, last_token
from glmjax.model.sampling_params import SamplingParams
from glmjax.model.sampling_state import SamplingState
from glmjax.speculation import begin, prefill, speculate
from tests.serving.hash_network import CONFIG, VOCAB, HashNetwork, Oracle

NETWORK = HashNetwork()
PROMPTS = ([5, 900, 33], [7, 7, 7, 7, 7, 1, 2, 3, 4, 600])


@functools.partial(jax.jit, static_argnames="num_draft")
def one_round(state, num_draft):
    return speculate(NETWORK, state, num_draft=num_draft)


def started():
    ids, positions = np.zeros((2, 12), np.int32), np.full((2, 12), -1, np.int32)
    for b, prompt in enumerate(PROMPTS):
        ids[b, : len(prompt)], positions[b, : len(prompt)] = prompt, range(len(prompt))
    cache = ContiguousCache.create(CONFIG, 2, 64, jnp.float32, mtp=True)
    step = cache.step(jnp.asarray(positions))
    hidden_BTD, cache = prefill(NETWORK, cache, cache.tail_BD, jnp.asarray(ids), step)
    sampling = SamplingState.from_params([SamplingParams(temperature=0)] * 2, PROMPTS, VOCAB)
    return begin(NETWORK, cache, last_token(step, hidden_BTD, cache.tail_BD), jnp.array([3, 10]), sampling)


def test_every_round_emits_what_the_oracle_says():
    """Tokens of target and draft alike, across the selection's size."""
    state = started()
    texts = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, state.token_B, strict=True)]
    assert [text[-1:] for text in texts] == [Oracle(prompt).following(1) for prompt in PROMPTS]
    lengths = []
    for _ in range(10):
        out = one_round(state, num_draft=2)
        for b, text in enumerate(texts):
            emitted = out.tokens_BT[b, : out.count_B[b]].tolist()
            assert emitted == Oracle(text).round(2)
            text += emitted
            lengths.append(len(emitted))
        state = out.state
    assert set(lengths) == {1, 2, 3}
