"""Packing loses nothing, knows where documents begin, and an interrupted run goes on as if nothing had happened."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from glmjax.training import data, vocabulary
from glmjax.training.corpus import Document

END = 0

unhurried = hypothesis.settings(max_examples=40, deadline=None)  # the machine may be busy


def distinct(*lengths):
    """Documents in which every token is unique, so that a token tells where it is from; END is the end token."""
    ids = np.arange(1, sum(lengths) + 1)
    offsets = np.cumsum([0, *lengths])
    for end in offsets[1:]:
        ids[end - 1] = END
    return data.Tokens(ids.astype(np.int32), offsets.astype(np.int64), END)


def rows(tokens, seq_len, seed, count):
    source = data.PackedRows(tokens, seq_len=seq_len, seed=seed)
    return [source[i] for i in range(count)]


def counts(tokens, some_rows):
    return np.bincount(np.concatenate([row["ids_BT"] for row in some_rows]), minlength=len(tokens.ids) + 1)


lengths = st.lists(st.integers(2, 12), min_size=1, max_size=6)
seq_lens = st.integers(1, 16)
seeds = st.integers(0, 2**32)


@unhurried
@hypothesis.given(lengths, seq_lens, seeds)
def test_packing_loses_and_duplicates_no_token(sizes, seq_len, seed):
    tokens = distinct(*sizes)
    # After `seq_len + 1` epochs, rows and epochs end together.
    seen = counts(tokens, rows(tokens, seq_len, seed, len(tokens.ids)))
    np.testing.assert_array_equal(seen, counts(tokens, [{"ids_BT": tokens.ids}]) * (seq_len + 1))


@unhurried
@hypothesis.given(st.lists(st.integers(2, 12), min_size=4, max_size=4), st.integers(0, 3), seeds)
def test_an_epoch_is_every_document_exactly_once(sizes, epoch, seed):
    sizes[-1] += -sum(sizes) % 4
    tokens = distinct(*sizes)
    per_epoch = len(tokens.ids) // 4
    one = rows(tokens, 3, seed, (epoch + 1) * per_epoch)[epoch * per_epoch :]
    np.testing.assert_array_equal(counts(tokens, one), counts(tokens, [{"ids_BT": tokens.ids}]))


@unhurried
@hypothesis.given(lengths, seq_lens, seeds)
def test_start_is_where_the_tokens_document_begins(sizes, seq_len, seed):
    tokens = distinct(*sizes)
    for row in rows(tokens, seq_len, seed, 10):
        ids, starts = row["ids_BT"], row["start_BT"]
        assert ids.dtype == starts.dtype == np.int32
        assert starts[0] == 0
        for i in range(1, seq_len + 1):
            if ids[i - 1] == END:  # a new document, read from its beginning
                assert starts[i] == i
                assert ids[i] - 1 in tokens.offsets
            else:
                assert starts[i] == starts[i - 1]
                assert ids[i] in (ids[i - 1] + 1, END)


@unhurried
@hypothesis.given(lengths, seq_lens, seeds)
def test_a_cut_document_goes_on_in_another_row_of_the_stream(sizes, seq_len, seed):
    tokens = distinct(*sizes)
    source = data.PackedRows(tokens, seq_len=seq_len, seed=seed)
    stream = np.concatenate([source._read(*divmod(j * (seq_len + 1), len(tokens.ids)))[0] for j in range(8)])
    expected = np.concatenate([tokens[i] for epoch in range(70) for i in source._epoch(epoch).documents])
    np.testing.assert_array_equal(stream, expected[: len(stream)])


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return distinct(*rng.integers(2, 60, 50))


def batches(tokens, seed=0, **sizes):
    return iter(data.training_batches(tokens, **({"batch_size": 3, "seq_len": 15} | sizes), seed=seed))


def assert_same(left, right):
    assert left.keys() == right.keys() == {"ids_BT", "start_BT", "scored_BT"}
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_batches_have_the_promised_shapes(tokens):
    batch = next(batches(tokens))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "ids_BT": ((3, 16), np.int32),
        "scored_BT": ((3, 16), np.bool_),
        "start_BT": ((3, 16), np.int32),
    }


def test_batches_are_the_rows_in_order(tokens):
    first = list(itertools.islice(batches(tokens), 4))
    for i, row in enumerate(rows(tokens, 15, 0, 12)):
        assert_same({name: array[i % 3] for name, array in first[i // 3].items()}, row)


@unhurried
@hypothesis.given(st.integers(0, 200), st.integers(0, 5))
def test_resuming_at_any_step_continues_with_the_same_batches(tokens, step, seed):
    uninterrupted = batches(tokens, seed)
    for _ in range(step):
        next(uninterrupted)
    resumed = batches(tokens, seed)
    resumed.set_state(uninterrupted.get_state())
    for _ in range(5):
        assert_same(next(resumed), next(uninterrupted))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(tokens):
    def ids(seed):
        return np.stack([batch["ids_BT"] for batch in itertools.islice(batches(tokens, seed), 20)])

    np.testing.assert_array_equal(ids(1), ids(1))
    assert (ids(1) != ids(2)).any()


def test_every_epoch_has_another_order(tokens):
    source = data.PackedRows(tokens, seq_len=15, seed=0)
    orders = {tuple(source._epoch(epoch).documents) for epoch in range(5)}
    assert len(orders) == 5


def test_rows_of_a_long_document_are_not_neighbours():
    long_one = distinct(4000, 4000)
    source = data.PackedRows(long_one, seq_len=15, seed=0)
    firsts = [int(source[i]["ids_BT"][0]) for i in range(int(source.epoch_rows))]
    consecutive = sum(b - a == 16 for a, b in itertools.pairwise(firsts))
    assert consecutive < len(firsts) / 20


def test_a_row_without_a_target_is_refused(tokens):
    with pytest.raises(ValueError, match="seq_len is 0"):
        data.training_batches(tokens, batch_size=1, seq_len=0, seed=0)


DOCUMENTS = (Document("a.py", "x = 'é'\n"), Document("b.py", "def f():\n    return 1\n" * 9), Document("c.py", "y"))


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train([document.text for document in DOCUMENTS], vocab_size=280)


def test_tokenising_ends_each_document(tokenizer):
    tokens = data.tokenize(DOCUMENTS, tokenizer)
    assert len(tokens) == 3
    assert tokens.end_id == tokenizer.token_to_id("<|endoftext|>")
    for i, document in enumerate(DOCUMENTS):
        assert tokens[i][-1] == tokens.end_id
        assert tokenizer.decode(list(tokens[i][:-1])) == document.text


def test_tokenising_nothing_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no documents"):
        data.tokenize([], tokenizer)
