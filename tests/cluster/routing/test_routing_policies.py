"""Tests of the routing policy on views that are written out: which replicas are considered, and which is chosen."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.cluster.routing.policies import (
    DECODE_TOKENS,
    PrefixIndex,
    ReplicaView,
    cached_blocks,
    choose,
    expected_wait,
    uncached_tokens,
    worth_moving,
)
from qwen_jax.cluster.simulation.policies import RoundRobin, least_loaded, random_choice, two_choices
from qwen_jax.cluster.simulation.simulator import with_request
from qwen_jax.errors import UserError

POLICIES = (choose, random_choice, RoundRobin(), two_choices, least_loaded)
PROMPT = tuple(range(100, 110))  # ten blocks


def shares(policy, views, blocks=PROMPT, draws=2000):
    rng = Random(0)
    return Counter(policy(views, blocks, rng) for _ in range(draws))


def test_an_index_forgets_what_was_used_longest_ago_and_the_end_of_a_chain_first():
    index = PrefixIndex(5)
    index.add("abc")
    index.add("xy")
    assert len(index) == 5 and cached_blocks(index, "abc") == 3 and cached_blocks(index, "abz") == 2
    index.add("z")
    assert cached_blocks(index, "abc") == 2 and cached_blocks(index, "xy") == 2
    index.add("ab")
    index.add("pq")
    assert cached_blocks(index, "ab") == 2 and cached_blocks(index, "z") == 1
    assert "x" not in index and "y" not in index
    index.add("0123456789")
    assert cached_blocks(index, "0123456789") == 5 == len(index), "of what is too long, the beginning"
    nothing = PrefixIndex(0)
    nothing.add("abc")
    assert len(nothing) == 0
    with pytest.raises(UserError, match="capacity"):
        PrefixIndex(-1)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=20), st.integers(0, 8))
def test_an_index_never_has_a_block_without_those_before_it(prompts, capacity):
    index = PrefixIndex(capacity)
    chains = [[tuple(prompt[:end + 1]) for end in range(len(prompt))] for prompt in prompts]
    for chain in chains:
        index.add(chain)
        assert len(index) <= capacity
        assert all([key in index for key in chain] == sorted((key in index for key in chain), reverse=True)
                   for chain in chains)


def test_the_expected_wait_by_hand():
    view = ReplicaView("a", queued_prefill_tokens=1000, queued=2, running=3, prefix={100, 101, 102},
                       prefill_tokens_per_second=2000)
    assert uncached_tokens(view, PROMPT) == 7 * 64
    assert expected_wait(view, PROMPT) == pytest.approx((1000 + 448 + 5 * DECODE_TOKENS) / 2000)
    assert expected_wait(replace(view, kv_usage=0.5), PROMPT) == pytest.approx(expected_wait(view, PROMPT) * 16 / 15)
    assert expected_wait(replace(view, kv_usage=1.0), PROMPT) == pytest.approx(expected_wait(view, PROMPT) * 1000)


@given(st.integers(0, 10**6), st.integers(0, 100), st.integers(0, 100), st.floats(0, 1), st.integers(0, 10))
def test_more_to_wait_for_is_a_longer_wait(tokens, queued, running, usage, cached):
    view = ReplicaView("a", tokens, queued, running, usage, prefix=frozenset(PROMPT[:cached]))
    here = expected_wait(view, PROMPT)
    assert here >= 0
    assert expected_wait(replace(view, queued_prefill_tokens=tokens + 1), PROMPT) > here
    assert expected_wait(replace(view, queued=queued + 1), PROMPT) > here
    assert expected_wait(replace(view, running=running + 1), PROMPT) > here
    assert expected_wait(replace(view, kv_usage=min(1.0, usage + 0.1)), PROMPT) >= here
    assert expected_wait(replace(view, prefix=frozenset(PROMPT[:cached + 1])), PROMPT) <= here
    assert expected_wait(replace(view, prefill_tokens_per_second=10_000), PROMPT) <= here


def test_what_was_sent_counts_before_the_next_report():
    index = PrefixIndex(100)
    view = ReplicaView("a", prefix=index)
    first = with_request(view, PROMPT)
    assert (first.queued, first.queued_prefill_tokens) == (1, 640)
    index.add(PROMPT[:4])
    second = with_request(first, PROMPT)
    assert (second.queued, second.queued_prefill_tokens) == (2, 640 + 6 * 64)
    rng, views = Random(0), [ReplicaView("a"), ReplicaView("b")]
    for _ in range(100):
        name = choose(views, PROMPT, rng)
        views = [with_request(view, PROMPT) if view.name == name else view for view in views]
        assert abs(views[0].queued - views[1].queued) <= 1


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: getattr(policy, "__name__", type(policy).__name__))
def test_nobody_is_sent_to_who_does_not_accept(policy):
    views = [ReplicaView(str(number), queued=number, accepting=number in (1, 4), prefix=frozenset(PROMPT))
             for number in range(6)]
    assert set(shares(policy, views, draws=200)) <= {"1", "4"}
    assert policy([replace(view, accepting=False) for view in views], PROMPT, Random(0)) is None
    assert policy([], PROMPT, Random(0)) is None
    assert policy(views[4:5], PROMPT, Random(0)) == "4"


@pytest.mark.parametrize("policy", [choose, random_choice, two_choices, least_loaded])
def test_equal_replicas_get_equal_shares_and_a_seed_decides(policy):
    views = [ReplicaView(str(number)) for number in range(10)]
    counts = shares(policy, views)
    assert len(counts) == 10 and max(counts.values()) < 270 and min(counts.values()) > 130  # 200 each, 5 sigma
    assert shares(policy, views) == counts


def test_round_robin_takes_turns():
    views = [ReplicaView(name, accepting=name != "c") for name in "abcd"]
    policy = RoundRobin()
    assert [policy(views, (), Random(0)) for _ in range(7)] == list("abdabda")


def test_two_choices_and_the_fewest():
    views = [ReplicaView(str(number), queued=number, running=number) for number in range(4)]
    assert set(shares(least_loaded, views)) == {"0"}
    counts = shares(two_choices, views)  # of 6 pairs, 3, 2, 1 and none are won
    assert counts["3"] == 0
    assert all(abs(counts[str(number)] / 2000 - expected) < 0.06 for number, expected in ((0, 1/2), (1, 1/3), (2, 1/6)))


def test_tokens_count_and_not_only_requests():
    """A replica with a waiting request of 30,000 tokens is worse than a replica with three of 100."""
    views = [ReplicaView("long", queued=1, queued_prefill_tokens=30_000),
             ReplicaView("short", queued=3, queued_prefill_tokens=300)]
    assert set(shares(choose, views)) == {"short"} and set(shares(two_choices, views)) == {"long"}
    slow = [replace(views[1], name="slow", prefill_tokens_per_second=500), views[1]]
    assert set(shares(choose, slow)) == {"short"}
    full = [replace(views[1], name="full", kv_usage=0.97), views[1]]
    assert set(shares(choose, full)) == {"short"}


def test_a_prefix_draws_until_the_queue_there_takes_longer():
    others = [ReplicaView(str(number)) for number in range(100)]
    holder = ReplicaView("holder", prefix=frozenset(PROMPT))
    shorter = ReplicaView("shorter", prefix=frozenset(PROMPT[:4]))
    assert set(shares(choose, [*[shorter] * 50, holder])) == {"holder"}
    assert set(shares(choose, [*others, shorter, holder])) == {"holder"}
    assert set(shares(choose, [shorter, *others, replace(holder, accepting=False)])) == {"shorter"}
    assert set(shares(choose, [*others, replace(holder, queued_prefill_tokens=639)])) == {"holder"}
    busy = shares(choose, [*others, replace(holder, queued_prefill_tokens=641)])
    assert busy["holder"] == 0 and len(busy) == 100
    assert len(shares(choose, [*others, holder], blocks=())) > 90, "a prompt of less than a block has no prefix"


def test_of_many_with_the_prefix_two_are_asked():
    holders = [ReplicaView(str(number), queued_prefill_tokens=number, prefix=frozenset(PROMPT)) for number in range(4)]
    counts = shares(choose, [*holders, *(ReplicaView(f"other {number}") for number in range(100))])
    assert set(counts) == {"0", "1", "2"} and counts["0"] > counts["1"] > counts["2"]


def test_a_move_is_worth_it_where_the_request_waits_less():
    source = ReplicaView("a", queued_prefill_tokens=10_640, queued=3)  # the request and its 640 among them
    other = ReplicaView("b", queued_prefill_tokens=9_999, queued=2)
    assert worth_moving(source, other, PROMPT)
    assert not worth_moving(source, replace(other, queued_prefill_tokens=10_000), PROMPT), "it would change nothing"
    assert not worth_moving(source, replace(other, queued=3), PROMPT)
    assert worth_moving(source, replace(other, queued_prefill_tokens=10_100, prefix=frozenset(PROMPT)), PROMPT)
    has_prefix = replace(source, queued_prefill_tokens=10_000)
    assert not worth_moving(has_prefix, other, PROMPT)
    assert not worth_moving(source, ReplicaView("b", prefill_tokens_per_second=200), PROMPT)
