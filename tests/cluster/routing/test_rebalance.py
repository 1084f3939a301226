"""Tests of the moves between queues: the rule by hand, and properties for any queues."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.cluster.routing.rebalance import Move, rebalance_load
from qwen_jax.errors import UserError

queues = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 10_000)), max_size=40)


def after(loads, moves):
    loads = list(loads)
    for source, target, count in moves:
        loads[source] -= count
        loads[target] += count
    return loads


@pytest.mark.parametrize("loads, moves", [
    ([], []),
    ([7], []),
    ([0, 0, 0], []),
    ([5, 5, 5, 5], []),
    ([100, 0], [(0, 1, 15)]),  # mean 50, deficit 50
    ([90, 110], []),  # 90 is not under 0.9 x 100
    ([89, 111], [(1, 0, 3)]),
    ([0, 6], []),  # deficit 3: 0.9 of a request
    ([0, 7], [(1, 0, 1)]),
    # Mean 25, the donor can spare 75: four would take 7 each and 0.3 x 25 rounds down.
    ([100, 0, 0, 0], [(0, 1, 7), (0, 2, 7), (0, 3, 7)]),
    # Mean 25.5: after one move the third is the larger one.
    ([0, 52, 50, 0], [(1, 0, 7), (2, 3, 7)]),
    # Mean 10: under 9, but 0.3 x 2 rounds down.
    ([18, 8, 8, 8, 8], []),
    ([18, 8, 8, 16, 0], [(0, 4, 3)]),
    ([14] * 12 + [1], [(0, 12, 1)]),  # a deficit of 12, and no donor can spare more than 1
    # Four takers of 4 would leave one donor, which can spare 10, below the mean of 100.
    ([110] * 6 + [85] * 4, [(0, 6, 4), (1, 7, 4), (2, 8, 4), (3, 9, 4)]),
])
def test_the_rule_by_hand(loads, moves):
    assert rebalance_load(loads) == [Move(*move) for move in moves]


@given(queues)
def test_one_round(loads):
    moves = rebalance_load(loads)
    mean = Fraction(sum(loads), max(len(loads), 1))
    now, took = list(loads), set()
    for move in moves:
        deficit = mean - now[move.target]
        assert now[move.source] == max(now) and move.count >= 1
        assert 10 * now[move.target] < 9 * mean and move.count <= 3 * deficit / 10
        now = after(now, [move])
        assert min(now) >= 0 and max(now) <= max(loads)
        assert now[move.source] >= mean >= now[move.target]
        took.add(move.target)
    assert sum(now) == sum(loads) and len(took) == len(moves)
    assert [move.target for move in moves] == sorted(took)
    spare = max(now, default=0) - mean
    assert all(target in took or 10 * now[target] >= 9 * mean or mean - now[target] < Fraction(10, 3) or spare < 1
               for target in range(len(now))), "a replica was left out"


@given(queues)
def test_rounds_converge(loads):
    mean = Fraction(sum(loads), max(len(loads), 1))
    for _ in range(1000):
        moves = rebalance_load(loads)
        if not moves:
            break
        loads = after(loads, moves)
    assert not moves
    assert max(loads, default=0) - mean < 1 or all(
        10 * load >= 9 * mean or mean - load < Fraction(10, 3) for load in loads)


def test_loads_are_not_changed_and_may_be_numpys():
    loads = np.array([100, 0])
    assert rebalance_load(loads) == [Move(0, 1, 15)] and loads.tolist() == [100, 0]
    assert all(type(field) is int for field in rebalance_load(loads)[0])


@pytest.mark.parametrize("bad", [-1, 1.0, 0.5, True, np.True_, None, "3", float("nan")])
def test_what_is_not_a_number_of_requests_is_refused(bad):
    with pytest.raises(UserError, match="queued requests"):
        rebalance_load([3, bad, 10])
