"""Pages are free, held or retiring, and change hands by retirement alone."""

import hypothesis.stateful
import hypothesis.strategies as st
import pytest

from glmjax.serving.pool import Lease, Pool


def test_a_page_comes_back_at_another_version():
    pool = Pool(1)
    (lease,) = pool.lease(1)
    assert lease == Lease(0, 0)
    pool.release([lease])
    assert (pool.free, pool.retiring) == (0, 1)  # nothing has been told to the device yet
    assert pool.retire(8) == [0]
    assert pool.lease(1) == [Lease(0, 1)]
    assert pool.references(lease) == 0


def test_a_shared_page_lives_as_long_as_its_last_holder():
    pool = Pool(2)
    leases = pool.lease(2)
    pool.share(leases[:1])
    pool.release(leases)
    assert pool.retiring == 1
    assert pool.references(leases[0]) == 1
    pool.release(leases[:1])
    assert pool.retiring == 2


def test_what_nobody_holds_cannot_be_shared_or_released():
    pool = Pool(2)
    (lease,) = pool.lease(1)
    pool.release([lease])
    for use in (pool.share, pool.release):
        with pytest.raises(ValueError, match="not held"):
            use([lease])
    pool.retire(1)
    pool.lease(2)
    with pytest.raises(ValueError, match="version 1"):
        pool.release([lease])


def test_more_than_is_free_is_refused_and_nothing_is_taken():
    pool = Pool(3)
    pool.lease(2)
    with pytest.raises(ValueError, match="2 pages are wanted and 1 are free"):
        pool.lease(2)
    assert pool.free == 1


def test_a_dispatch_retires_no_more_than_it_has_room_for():
    pool = Pool(5)
    pool.release(pool.lease(5))
    assert len(pool.retire(3)) == 3
    assert (pool.free, pool.retiring) == (3, 2)


def test_no_pages_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)


@pytest.mark.parametrize("spoil", ["twice", "stale", "unheld"])
def test_check_finds_what_does_not_add_up(spoil):
    pool = Pool(3)
    leases = pool.lease(2)
    pool.check([leases])
    held = {"twice": [leases + leases[:1]], "stale": [[Lease(leases[0].page, 9), leases[1]]], "unheld": [leases[:1]]}
    with pytest.raises(AssertionError):
        pool.check(held[spoil])


class Holders(hypothesis.stateful.RuleBasedStateMachine):
    """Sequences that lease, share, release and retire in any order."""

    def __init__(self):
        super().__init__()
        self.pool, self.holders = Pool(7), []

    @hypothesis.stateful.rule(count=st.integers(0, 4))
    def lease(self, count):
        if count <= self.pool.free:
            self.holders.append(self.pool.lease(count))

    @hypothesis.stateful.precondition(lambda self: self.holders)
    @hypothesis.stateful.rule(data=st.data())
    def share(self, data):
        leases = data.draw(st.sampled_from(self.holders))
        self.pool.share(leases)
        self.holders.append(list(leases))

    @hypothesis.stateful.precondition(lambda self: self.holders)
    @hypothesis.stateful.rule(data=st.data())
    def release(self, data):
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @hypothesis.stateful.rule(most=st.integers(0, 4))
    def retire(self, most):
        before = dict(enumerate(self.pool._versions))
        for page in self.pool.retire(most):
            assert self.pool._versions[page] == before[page] + 1

    @hypothesis.stateful.invariant()
    def adds_up(self):
        self.pool.check(self.holders)


TestHolders = Holders.TestCase
TestHolders.settings = hypothesis.settings(max_examples=60, stateful_step_count=40, deadline=None)
