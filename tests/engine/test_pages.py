"""The page allocator, against a model that is two sets."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen_jax.engine.pages import NULL_PAGE, PAGE, OutOfPages, PagePool, pages_for

CAPACITY = 12


def test_pages_for_rounds_up():
    assert [pages_for(n) for n in (0, 1, PAGE - 1, PAGE, PAGE + 1, 10 * PAGE)] == [0, 1, 1, 1, 2, 10]


def test_every_page_but_the_null_page_is_handed_out_once():
    pool = PagePool(CAPACITY + 1)
    assert pool.num_free == pool.capacity == CAPACITY
    assert sorted(pool.allocate(CAPACITY)) == list(range(1, CAPACITY + 1))
    assert pool.num_free == 0 and not pool.can_allocate(1) and pool.can_allocate(0)


def test_running_out_changes_nothing():
    pool = PagePool(5)
    pool.allocate(2)
    with pytest.raises(OutOfPages, match="3 pages asked, 2 of 4 free"):
        pool.allocate(3)
    assert pool.num_free == 2 and len(pool.allocate(2)) == 2


@pytest.mark.parametrize("bad", ["freed before", "null", "foreign", "twice in one call"])
def test_a_page_that_is_not_in_use_is_refused_and_nothing_is_freed(bad):
    pool = PagePool(6)
    mine, other = pool.allocate(2), pool.allocate(1)
    pool.free(other)
    pages = {"freed before": mine + other, "null": mine + [NULL_PAGE], "foreign": mine + [99],
             "twice in one call": mine + mine[:1]}[bad]
    with pytest.raises(ValueError, match="not all in use"):
        pool.free(pages)
    assert pool.num_free == 3
    pool.free(mine)
    assert pool.num_free == 5


@pytest.mark.parametrize("num_pages", [-1, 0, 1])
def test_a_pool_needs_a_page_to_give(num_pages):
    with pytest.raises(ValueError, match="null page"):
        PagePool(num_pages)


def test_negative_allocation_is_refused():
    with pytest.raises(ValueError, match="-1"):
        PagePool(4).allocate(-1)


class PoolMachine(RuleBasedStateMachine):
    """Owners take and return pages in any order; the model is the set of pages each one holds."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(CAPACITY + 1)
        self.held: list[list[int]] = []

    @rule(n=st.integers(0, CAPACITY + 2))
    def allocate(self, n):
        free = CAPACITY - sum(map(len, self.held))
        assert self.pool.can_allocate(n) == (n <= free)
        if n > free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(n)
        else:
            self.held.append(self.pool.allocate(n))
            assert len(self.held[-1]) == n

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(pages)
        if pages:
            with pytest.raises(ValueError):
                self.pool.free(pages)

    @invariant()
    def no_page_is_lost_or_shared(self):
        held = [page for pages in self.held for page in pages]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(1, CAPACITY + 1))
        assert self.pool.num_free == CAPACITY - len(held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
