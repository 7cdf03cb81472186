"""The prefix tree finds the longest cached prefix, page by page, and lets go of the longest unused leaves first."""

import hypothesis.stateful
import hypothesis.strategies as st
import pytest

from glmjax.serving.pool import Pool
from glmjax.serving.tree import PrefixTree

A = 4


@pytest.fixture
def pool():
    return Pool(16)


@pytest.fixture
def tree(pool):
    return PrefixTree(pool, A)


def keep(pool, tree, ids, namespace=None):
    """Insert the full pages of a sequence that ends; the pages that the tree found for it."""
    leases = pool.lease(len(ids) // A)
    tree.insert(ids, leases, namespace)
    pool.release(leases)
    pool.retire(len(pool))
    return tree.match(ids, namespace)


@pytest.mark.parametrize(("asked", "pages"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (11, 2), (12, 3), (15, 3)])
def test_whole_pages_are_found(pool, tree, asked, pages):
    ids = list(range(12))
    leases = keep(pool, tree, ids)
    assert tree.match([*ids, 90, 91, 92][:asked]) == leases[:pages]


def test_a_page_belongs_to_the_tokens_before_it_too(pool, tree):
    keep(pool, tree, [1, 2, 3, 4, 5, 6, 7, 8])
    assert tree.match([5, 6, 7, 8]) == []
    assert len(tree.match([1, 2, 3, 4, 5, 6, 7, 9])) == 1


def test_namespaces_share_nothing(pool, tree):
    leases = keep(pool, tree, [1, 2, 3, 4], "a tenant")
    assert tree.match([1, 2, 3, 4]) == []
    assert tree.match([1, 2, 3, 4], "a tenant") == leases


def test_the_same_tokens_are_kept_once(pool, tree):
    first, again = pool.lease(2), pool.lease(2)
    assert tree.insert(range(8), first) == 2
    assert tree.insert(range(8), again) == 0
    assert tree.match(range(8)) == first
    pool.release(again)
    assert pool.retiring == 2


def test_pages_that_are_not_full_are_refused(pool, tree):
    with pytest.raises(ValueError, match="7 tokens do not fill 2 pages of 4"):
        tree.insert(range(7), pool.lease(2))


def test_the_longest_unused_goes_first_and_leaves_before_their_parents(pool, tree):
    old = keep(pool, tree, [1, 1, 1, 1, 2, 2, 2, 2])
    young = keep(pool, tree, [3, 3, 3, 3])
    assert len(tree.evict(1)) == 1
    assert tree.match([1, 1, 1, 1, 2, 2, 2, 2]) == old[:1]  # which is a use
    assert len(tree.evict(1)) == 1
    assert young[0] not in tree
    assert old[0] in tree
    assert len(tree.evict(5)) == 1


def test_pages_in_use_stay(pool, tree):
    (lease,) = keep(pool, tree, [1, 2, 3, 4])
    pool.share([lease])
    assert len(tree.evict(1)) == 0
    pool.release([lease])
    assert len(tree.evict(1)) == 1


def test_what_is_removed_takes_along_what_depends_on_it(pool, tree):
    one = keep(pool, tree, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    other = keep(pool, tree, [1, 1, 1, 1, 4, 4, 4, 4])
    assert set(tree.remove([one[1]])) == set(one[1:])
    assert set(tree) == {one[0], other[1]}
    assert set(tree.clear()) == {one[0], other[1]}
    pool.check([])


class Prefixes(hypothesis.stateful.RuleBasedStateMachine):
    """Sequences over few tokens, so that many begin alike, against a dictionary of what should be found."""

    texts = st.lists(st.integers(0, 1), max_size=5 * A)

    def __init__(self):
        super().__init__()
        self.pool = Pool(12)
        self.tree = PrefixTree(self.pool, A)
        self.found, self.running = {}, []

    @hypothesis.stateful.rule(ids=texts, runs_on=st.booleans())
    def serve(self, ids, runs_on):
        matched = self.tree.match(ids)
        assert matched == [self.found[tuple(ids[:end])] for end in range(A, A * len(matched) + 1, A)]
        assert tuple(ids[: A * len(matched) + A]) not in self.found or len(ids) < A * len(matched) + A
        self.pool.share(matched)
        wanted = len(ids) // A - len(matched)
        if wanted > self.pool.free:
            self.tree.evict(wanted - self.pool.free)
            self.pool.retire(len(self.pool))
        if wanted > self.pool.free:
            self.pool.release(matched)
        else:
            leases = [*matched, *self.pool.lease(wanted)]
            self.tree.insert(ids, leases)
            self.running.append(leases)
            if not runs_on:
                self.pool.release(self.running.pop())
        self.forget()
        self.found |= {tuple(ids[: A * (n + 1)]): lease for n, lease in enumerate(self.tree.match(ids))}

    @hypothesis.stateful.precondition(lambda self: self.running)
    @hypothesis.stateful.rule(data=st.data())
    def finish(self, data):
        self.pool.release(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @hypothesis.stateful.precondition(lambda self: self.found)
    @hypothesis.stateful.rule(data=st.data())
    def remove(self, data):
        self.tree.remove([data.draw(st.sampled_from(sorted(self.found.values())))])
        self.forget()

    def forget(self):
        self.found = {ids: lease for ids, lease in self.found.items() if lease in self.tree}

    @hypothesis.stateful.invariant()
    def adds_up(self):
        self.tree.check()
        assert set(self.found.values()) == set(self.tree)
        self.pool.check([*self.running, self.tree])


TestPrefixes = Prefixes.TestCase
TestPrefixes.settings = hypothesis.settings(max_examples=80, stateful_step_count=40, deadline=None)
