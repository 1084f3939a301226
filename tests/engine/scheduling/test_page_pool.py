"""The page allocator, against a model that is two sets."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen_jax.engine.scheduling.page_pool import NULL_PAGE, PAGE, OutOfPages, PagePool, chain, pages_for

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


def test_kept_pages_are_found_shared_and_evicted_last_and_longest_unused_first():
    pool = PagePool(6)
    a, b, c = pool.allocate(3)
    for key, page in ((b"a", a), (b"b", b), (b"c", c)):
        pool.keep(key, page)
    pool.free([c])
    pool.free([a, b])  # as a chain: b goes before a
    assert pool.num_free == 5 and pool.match([b"a", b"b", b"x", b"c"]) == [a, b]
    pool.share([c])
    assert pool.num_free == 4 and not pool.is_idle(c) and pool.is_idle(a)
    assert not {a, b, c} & set(pool.allocate(2)), "pages that were not kept come first"
    assert pool.allocate(1) == [b] and pool.match([b"a"]) == [a] and pool.match([b"b"]) == []
    assert pool.allocate(1) == [a] and not pool.can_allocate(1) and pool.match([b"c"]) == [c]


def test_the_first_page_of_a_key_stays():
    pool = PagePool(4)
    a, b = pool.allocate(2)
    pool.keep(b"k", a)
    pool.keep(b"k", b)
    pool.keep(b"other", a)
    assert pool.match([b"k"]) == [a] and pool.match([b"other"]) == []
    pool.free([b])
    with pytest.raises(ValueError, match="not in use"):
        pool.keep(b"late", b)


def test_a_shared_page_is_free_when_its_last_user_leaves():
    pool = PagePool(3)
    page, = pool.allocate(1)
    pool.keep(b"k", page)
    pool.share([page])
    pool.free([page])
    assert pool.num_free == 1
    pool.free([page])
    assert pool.num_free == 2
    with pytest.raises(ValueError, match="not all in use"):
        pool.free([page])


def test_a_key_says_the_whole_prefix():
    page, other = list(range(PAGE)), [5] * PAGE
    keys = {chain(b"a", page), chain(b"b", page), chain(b"a", other), chain(chain(b"a", page), other),
            chain(chain(b"b", page), other)}
    assert len(keys) == 5 and chain(b"a", page) == chain(b"a", tuple(page))


def test_forgotten_pages_and_those_after_them_are_not_found():
    pool = PagePool(8)
    keys = [b"a", b"b", b"c", b"d"]
    pages = pool.allocate(4)
    for before, key, page in zip([b"salt", *keys], keys, pages, strict=False):
        pool.keep(key, page, before)
    other, = pool.allocate(1)
    pool.keep(b"other", other, b"a")
    pool.free(pages[2:])
    assert pool.match(keys) == pages and pool.num_free == 4
    pool.forget([pages[1]])
    assert pool.match(keys) == pages[:1] and pool.match([b"other"]) == [other]
    assert [pool.match([key]) for key in keys[1:]] == [[], [], []]
    assert pool.num_free == 4  # those in use stay so
    pool.free(pages[:2])
    pool.forget(pages)  # again, and of an idle page
    assert pool.match(keys) == [] == pool.match([b"other"]) and pool.num_free == 6
    assert len(pool.allocate(6)) == 6


class PoolMachine(RuleBasedStateMachine):
    """Owners that take, keep, share and return pages in any order.

    The model is the pages that each owner holds, and the page that was kept under each key.
    """

    def __init__(self):
        super().__init__()
        self.pool = PagePool(CAPACITY + 1)
        self.held: list[list[int]] = []
        self.kept: dict[int, int] = {}  # key -> page, of pages in use or not handed out since

    def used(self):
        return {page for pages in self.held for page in pages}

    @rule(n=st.integers(0, CAPACITY + 2))
    def allocate(self, n):
        free = CAPACITY - len(self.used())
        assert self.pool.can_allocate(n) == (n <= free)
        if n > free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(n)
        else:
            pages = self.pool.allocate(n)
            assert len(set(pages)) == n and not set(pages) & self.used()
            self.held.append(pages)
            self.kept = {key: page for key, page in self.kept.items() if page not in pages}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(pages)
        if set(pages) - self.used():
            with pytest.raises(ValueError):
                self.pool.free(pages)

    @precondition(lambda self: self.used())
    @rule(data=st.data(), key=st.integers(0, 9))
    def keep(self, data, key):
        page = data.draw(st.sampled_from(sorted(self.used())))
        self.pool.keep(bytes([key]), page)
        if key not in self.kept and page not in self.kept.values():
            self.kept[key] = page

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def share(self, data):
        key = data.draw(st.sampled_from(sorted(self.kept)))
        assert self.pool.match([bytes([key])]) == [self.kept[key]]
        self.pool.share([self.kept[key]])
        self.held.append([self.kept[key]])

    @invariant()
    def no_page_is_lost(self):
        assert self.used() <= set(range(1, CAPACITY + 1))
        assert self.pool.num_free == CAPACITY - len(self.used())
        assert [self.pool.match([bytes([key])]) for key in range(10)] == [
            [self.kept[key]] if key in self.kept else [] for key in range(10)]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
