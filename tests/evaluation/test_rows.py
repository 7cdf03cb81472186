"""Every token is scored once, behind what precedes it."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from glmjax.evaluation.rows import scored_rows

END = 0


def distinct(*lengths):
    """Documents in which every token is unique, so that a token tells where it is from."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return np.split(ids, np.cumsum(lengths)[:-1])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9))
def test_every_token_is_scored_once_after_what_precedes_it(sizes, seq_len, context):
    documents, context = distinct(*sizes), min(context, seq_len)
    scored = [[] for _ in sizes]
    for batch in scored_rows(documents, END, batch_size=3, seq_len=seq_len, context=context):
        assert batch.ids_BT.shape == batch.start_BT.shape == batch.scored_BT.shape == (3, seq_len + 1)
        for ids, starts, flags, number in zip(*batch, strict=True):
            assert not flags[0]
            if number < 0:
                assert not flags.any()
            for t in np.flatnonzero(flags):
                seen = documents[number].tolist().index(ids[t])  # tokens of the document before this one
                assert seen == len(scored[number])
                assert ids[t - 1] == (documents[number][seen - 1] if seen else END)
                assert starts[t] == (ids[0] == END)  # the end token in front is of another document
                assert t - starts[t] >= min(seen, context)
                scored[number].append(ids[t])
    assert [document.tolist() for document in documents] == scored


def test_what_fills_up_a_row_sees_only_itself():
    (batch,) = scored_rows(distinct(2), END, batch_size=2, seq_len=5, context=1)
    np.testing.assert_array_equal(batch.ids_BT, [[0, 1, 2, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.start_BT, [[0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(batch.scored_BT, [[0, 1, 1, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.document_B, [0, -1])


def test_a_context_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="context is 9"):
        next(scored_rows(distinct(3), END, batch_size=1, seq_len=8, context=9))
