"""Whoever follows the events of the cache knows what is in the prefix tree, from whenever he begins."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.serving.events import CacheEvents, Cleared, LostError, Removed, Stored
from glmjax.serving.pool import Pool
from glmjax.serving.tree import PrefixTree

A = 2


class Follower:
    """What a router makes of batches: pages by their digest, each below the one before it."""

    def __init__(self, batches):
        self.pages, self.number = {}, batches[0].number - 1
        for batch in batches:
            assert batch.number == self.number + 1
            self.apply(batch)

    def apply(self, batch):
        for event in batch.events:
            match event:
                case Stored():
                    assert event.before in self.pages or not event.before, "a page came before the one it follows"
                    self.pages[event.digest] = event
                case Removed():
                    del self.pages[event.digest]
                case Cleared():
                    self.pages.clear()
        self.number = batch.number

    def follow(self, told):
        for batch in told.after(self.number):
            assert batch.number == self.number + 1
            self.apply(batch)

    def prefixes(self):
        """The tokens of every page and all before it."""

        def ids(page):
            before = ids(self.pages[page.before]) if page.before else ()
            return (*before, *np.frombuffer(page.ids, np.int32).tolist())

        return {ids(page) for page in self.pages.values()}


def insert(pool, tree, ids, namespace=None):
    leases = pool.lease(len(ids) // A)
    tree.insert(ids, leases, namespace)
    pool.release(leases)


def held(tree):
    """The tokens of every page of the namespace None, and all before it."""
    found = set()
    for ids, _, namespace in tree.paths():
        if namespace is None:
            found |= {ids[: n + A] for n in range(0, len(ids), A)}
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["insert", "salted", "evict", "clear"]), st.integers(0, 255)), max_size=30))
def test_followers_know_what_is_there(steps):
    pool, told = Pool(400), CacheEvents(most_events=3)
    tree = PrefixTree(pool, A, told)
    early = Follower(told.everything(tree))
    for kind, value in steps:
        ids = [int(bit) for bit in f"{value:08b}"]
        if kind == "evict":
            tree.evict(value % 5)
        elif kind == "clear":
            tree.clear()
        else:
            insert(pool, tree, ids, "salt" if kind == "salted" else None)
        told.publish()
        early.follow(told)
        pieces = told.everything(tree)
        assert all(len(piece.events) <= 3 for piece in pieces)
        for piece in pieces[:-1]:
            with pytest.raises(LostError):
                told.after(piece.number)  # who has only some of them cannot go on from there
        late = Follower(pieces)
        assert early.prefixes() == late.prefixes() == held(tree)


def test_who_comes_back_too_late_is_told_so():
    told = CacheEvents(most=3)
    [first] = told.everything(PrefixTree(Pool(1), A, told))
    for _ in range(4):
        told.cleared()
        told.publish()
    with pytest.raises(LostError, match="is not among"):
        told.after(first.number)
    assert [batch.number for batch in told.after(first.number + 1)] == [first.number + n for n in (2, 3, 4)]
    with pytest.raises(LostError):
        told.after(first.number + 5)  # of another engine


def test_a_later_engine_has_later_numbers():
    first = CacheEvents()
    first.cleared()
    first.publish()
    later = CacheEvents()
    [batch] = first.everything(PrefixTree(Pool(1), A, first))
    with pytest.raises(LostError):
        later.after(batch.number)


def test_nothing_happened_is_no_batch():
    told = CacheEvents()
    [batch] = told.everything(PrefixTree(Pool(1), A, told))
    told.publish()
    assert told.after(batch.number) == ()


def test_watchers_are_called_for_every_batch_until_they_leave():
    told, calls = CacheEvents(), threading.Semaphore(0)
    with told.watched(calls.release):
        told.cleared()
        told.publish()
        assert calls.acquire(blocking=False)
    told.cleared()
    told.publish()
    assert not calls.acquire(blocking=False)
