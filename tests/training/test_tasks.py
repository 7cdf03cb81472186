"""Blanks, lines to recall, repetition and copies: what a row is turned into, and that nothing else moves."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from glmjax.model.infill import BlankTokens
from glmjax.model.tokenizer import Tokenizer
from glmjax.nano import NANO
from glmjax.training.tasks import Shares, Tasks

CODE = "".join(f"def f{i}(x):\n    y = x + {i}\n    return y * {i}\n\n" for i in range(40))
unhurried = hypothesis.settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32)
TOKENIZER = Tokenizer.from_dir(NANO)
BLANKS = BlankTokens.of(TOKENIZER)
IDS = np.array(TOKENIZER.encode(CODE), np.int32)


FILLING, RECALLING, REPEATING, COPYING = (
    Tasks(TOKENIZER, Shares(**{name: 1.0})) for name in ("infill", "recall", "repeat", "copies")
)


@unhurried
@hypothesis.given(seeds, st.integers(48, 300))
def test_what_follows_the_masks_belongs_there(seed, length):
    """With the spans put back where their masks are, the part is what it was, but for the tokens pushed off its end."""
    part = IDS[:length]
    out, scored = FILLING.with_blanks(part, np.random.default_rng(seed))
    assert out.shape == part.shape
    np.testing.assert_array_equal(scored, ~np.isin(out, BLANKS[:3]))
    first = int(np.argmax(out == BLANKS.sop))
    spans = np.split(out[first:], np.flatnonzero(out[first:] == BLANKS.sop)[1:])
    assert all(span[-1] == BLANKS.eop and len(span) > 2 for span in spans)
    middles = [list(span[1:-1]) for span in spans]
    outside = out[:first]
    if BLANKS.gmask in outside:
        assert outside[-1] == BLANKS.gmask
        np.testing.assert_array_equal([*outside[:-1], *middles[0]], part[:-3])
        return
    pieces = np.split(outside, np.flatnonzero(outside == BLANKS.mask))
    kept = [list(pieces[0]), *(list(piece[1:]) for piece in pieces[1:])]
    assert 1 <= len(middles) == len(kept) - 1 <= 3
    original = list(part[: length - 3 * len(middles)])
    for piece in kept[:-1]:  # each gap is one of the middles, in whatever order
        assert original[: len(piece)] == piece
        original = original[len(piece) :]
        middle = next(m for m in sorted(middles, key=len, reverse=True) if original[: len(m)] == m)
        middles.remove(middle)
        original = original[len(middle) :]
    assert original == kept[-1]


def test_middles_come_in_any_order():
    """GLM shuffles them, so that a blank may depend on any other."""
    orders = set()
    for seed in range(200):
        out, _ = FILLING.with_blanks(IDS[:200], np.random.default_rng(seed))
        masks = int(np.sum(out == BLANKS.mask))
        if masks == 2:
            middles = [span[1] for span in np.split(out, np.flatnonzero(out == BLANKS.sop))[1:]]
            gap = int(np.argmax(out == BLANKS.mask))
            orders.add(bool(middles[0] == IDS[gap]))
    assert orders == {True, False}


@unhurried
@hypothesis.given(seeds)
def test_only_answers_are_asked_for_and_they_were_planted(seed):
    out, scored = RECALLING.with_recall(IDS[:400], np.random.default_rng(seed))
    assert len(out) == 400
    text = TOKENIZER.decode(out.tolist())
    planted = [line for line in text.splitlines() if "_" in line and '= "' in line and "assert" not in line]
    assert 1 <= len(planted) <= 400 // 48
    assert text.count("assert ") == len(planted)
    answer = TOKENIZER.decode([int(i) for i, s in zip(out, scored, strict=True) if s])
    for line in text.splitlines():
        if line.startswith("assert "):
            name, value = line.removeprefix("assert ").split(" == ")
            assert f"{name} = {value}" in planted
            assert f'{value.strip('"')}"\n' in answer
    for line in planted:
        assert line not in answer


@unhurried
@hypothesis.given(seeds, st.integers(60, 250))
def test_the_longest_document_alone_is_rewritten(seed, length):
    ids = np.concatenate([IDS[: 300 - length], IDS[:length]]).astype(np.int32)
    starts = np.repeat([0, 300 - length], [300 - length, length])
    longest = slice(0, 300 - length) if 300 - length >= length else slice(300 - length, 300)
    for task in (FILLING, RECALLING, REPEATING, COPYING):
        out, scored = task(ids, starts, np.random.default_rng(seed))
        rest = np.ones(300, bool)
        rest[longest] = False
        np.testing.assert_array_equal(out[rest], ids[rest])
        assert scored[rest].all()
        assert scored[longest].all() == (task is REPEATING)


@unhurried
@hypothesis.given(seeds, st.integers(48, 300))
def test_what_repeats_itself_is_the_first_half_in_pieces(seed, length):
    part = IDS[:length]
    out, scored = REPEATING.with_repeats(part, np.random.default_rng(seed))
    half = length // 2
    np.testing.assert_array_equal(out[:half], part[:half])
    assert sorted(out[half : 2 * half]) == sorted(part[:half])
    following = set(itertools.pairwise(part[:half].tolist()))
    seams = sum(pair not in following for pair in itertools.pairwise(out[half : 2 * half].tolist()))
    assert seams <= half // 8  # pieces have eight tokens and more
    assert scored.all()


@unhurried
@hypothesis.given(seeds, st.integers(48, 300))
def test_copies_come_over_and_over_and_only_they_are_predicted(seed, length):
    out, scored = COPYING.with_copies(IDS[:length], np.random.default_rng(seed))
    period = int(np.argmax(scored))
    assert 8 <= period <= length // 2
    assert scored[period:].all()
    assert not scored[:period].any()
    np.testing.assert_array_equal(out[period:], out[:-period])
    assert len(set(out[:period].tolist())) > period * 0.8  # of the whole vocabulary


def test_short_documents_and_most_rows_stay_as_they_are():
    ids, starts = IDS[:40], np.zeros(40, np.int32)
    out, scored = FILLING(ids, starts, np.random.default_rng(0))
    np.testing.assert_array_equal(out, ids)
    assert scored.all()
    some = Tasks(TOKENIZER, Shares(infill=0.2, recall=0.1))
    changed = [not some(IDS[:200], np.zeros(200), np.random.default_rng(i))[1].all() for i in range(500)]
    assert 0.24 < np.mean(changed) < 0.36


def test_a_row_is_not_changed_in_place():
    ids = IDS[:200].copy()
    FILLING(ids, np.zeros(200, np.int32), np.random.default_rng(0))
    np.testing.assert_array_equal(ids, IDS[:200])


@pytest.mark.parametrize(
    "shares", [Shares(infill=-0.1), Shares(copies=-0.1), Shares(infill=0.7, recall=0.2, repeat=0.2)]
)
def test_shares_are_shares(shares):
    with pytest.raises(ValueError, match="within"):
        Tasks(TOKENIZER, shares)
