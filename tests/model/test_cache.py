"""The contiguous cache: what tokens see, what is dropped, what a rejected draft leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.model.cache import ContiguousCache, last_token, previous_hidden

CAPACITY, T = 32, 8


@jax.jit
def run(model, cache, ids_BT, positions_BT):
    """Hidden states of the tokens, and the cache with their rows committed."""
    step = cache.step(positions_BT)
    out = model.backbone(ids_BT, cache, step)
    return out.hidden_BTD, out.cache.commit(step, out.hidden_BTD)


def empty(model, batch=2, dtype=jnp.float32):
    return ContiguousCache.create(model.config, batch, CAPACITY, dtype)


@pytest.fixture
def text(sparse):
    """Two different sequences of sixteen tokens, twice index_topk."""
    return jnp.stack([sparse.ids[0, :16], sparse.ids[0, 16:32]])


@pytest.fixture
def truth(sparse, text):
    """Hidden states of both sequences, in two chunks; and the cache after them."""
    cache, hidden = empty(sparse.model), []
    for begin in (0, T):
        positions = jnp.broadcast_to(jnp.arange(begin, begin + T), (2, T))
        found, cache = run(sparse.model, cache, text[:, begin : begin + T], positions)
        hidden.append(np.asarray(found))
    return np.concatenate(hidden, axis=1), cache


def test_sequences_of_a_batch_may_be_at_different_places(sparse, text, truth):
    """One sequence is prefilled by five tokens, the other by eight; padding fills the rest."""
    lengths = np.array([5, 8])
    columns = np.broadcast_to(np.arange(T), (2, T))
    first, cache = run(
        sparse.model, empty(sparse.model), text[:, :T], np.where(columns < lengths[:, None], columns, -1)
    )
    moved = np.stack([np.asarray(text)[b, lengths[b] : lengths[b] + T] for b in range(2)])
    second, _ = run(sparse.model, cache, moved, lengths[:, None] + columns)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(first[b, :length], truth[0][b, :length], atol=2e-5)
        np.testing.assert_allclose(second[b], truth[0][b, length : length + T], atol=2e-5)


def test_rejected_drafts_need_no_clean_up(sparse, text, truth):
    """Eight wrong tokens are appended behind the prompt, then the right ones at the same positions."""
    positions = jnp.broadcast_to(jnp.arange(T, 2 * T), (2, T))
    _, cache = run(sparse.model, empty(sparse.model), text[:, :T], jnp.broadcast_to(jnp.arange(T), (2, T)))
    _, cache = run(sparse.model, cache, (text[:, T:] + 1) % 160, positions)
    found, _ = run(sparse.model, cache, text[:, T:], positions)
    np.testing.assert_allclose(found, truth[0][:, T:], atol=2e-5)


def test_a_row_beyond_the_capacity_is_dropped_not_written_elsewhere(sparse, text, truth):
    _, cache = truth
    positions = jnp.full((2, T), -1).at[0, :2].set(jnp.array([CAPACITY, CAPACITY + 3]))
    _, after = run(sparse.model, cache, text[:, :T], positions)
    np.testing.assert_array_equal(after.latents.values_LGAC, cache.latents.values_LGAC)
    np.testing.assert_array_equal(after.index_keys.values_LGAC, cache.index_keys.values_LGAC)


def test_the_tail_is_the_last_real_token(sparse, text, truth):
    hidden, cache = truth
    np.testing.assert_array_equal(cache.tail_BD, hidden[:, -1])
    step = cache.step(jnp.array([[0, 1, -1], [-1, -1, -1]]))
    rows = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(last_token(step, rows, jnp.full((2, 2), 9.0)), [[2, 3], [9, 9]])


def test_previous_hidden_shifts_by_one_across_chunks():
    hidden = jnp.arange(6.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(previous_hidden(hidden, jnp.full((1, 2), 9.0))[0], [[9, 9], [0, 1], [2, 3]])


def test_a_narrower_cache_rounds_rows_and_nothing_else(sparse, text):
    """bf16 rows under a float32 model: close where every visible row is selected anyway, so no choice can flip."""
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    wanted, _ = run(sparse.model, empty(sparse.model), text[:, :T], positions)
    found, cache = run(sparse.model, empty(sparse.model, dtype=jnp.bfloat16), text[:, :T], positions)
    assert cache.latents.values_LGAC.dtype == jnp.bfloat16
    assert found.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)
    assert 1e-5 < error < 0.02


def test_one_entry_serves_a_forward_over_whole_sequences(sparse):
    cache = ContiguousCache.create(sparse.model.config, 2, CAPACITY, jnp.float32, layered=False)
    assert cache.latents.values_LGAC.shape[0] == cache.index_keys.values_LGAC.shape[0] == 1
