"""The bandit on a simulated clock, with made-up costs of steps and exact regret."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine.scheduling.decode_adaptation import CREDIT, Bandit

SHIFT = [[1, .7, .6, 1.2, 1.5, 1.8], [1, 1.6, 1.3, .7, .9, 1.5]]  # costs of six choices, before and after


def play(phases, steps=500, noise=0.1, seed=0, slack=0.1):
    """Return the cost of the bandit, and of every fixed choice."""
    rng, bandit = random.Random(seed), Bandit(len(phases[0]), slack)
    total, fixed = 0.0, [0.0] * len(phases[0])
    for step in range(steps):
        costs = [cost * max(0.5, rng.gauss(1, noise)) for cost in phases[step * len(phases) // steps]]
        choice = bandit.choose()
        bandit.record(choice, costs[choice], 1)
        total += costs[choice]
        fixed = [sum(pair) for pair in zip(fixed, costs)]
    return total, fixed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("phases", [SHIFT, SHIFT[::-1], [*SHIFT, *SHIFT], [[1, 1.5, 1.5, 2, 2, 2]]])
def test_a_load_that_shifts(phases, seed):
    total, fixed = play(phases, seed=seed)
    assert total <= 1.10 * min(fixed), "regret against the best fixed choice"
    assert max(fixed) >= 1.3 * total, "gain on the worst"


@pytest.mark.parametrize("phases", [[[1, 0.6], [1, 1.8]], [[1, 1.8], [1, 0.6]]])
def test_it_follows_a_shift(phases):
    total, fixed = play(phases)
    assert total < 0.92 * min(fixed), "one fixed choice is good in one half only"


def test_without_a_better_choice_it_stays_with_the_default():
    total, fixed = play([[1, 1.5, 2, 2.5]])
    assert total <= 1.06 * fixed[0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(0.1, 5), min_size=2, max_size=2), min_size=20, max_size=300), st.floats(0.02, 0.3))
def test_never_slower_than_the_default_by_more_than_the_bound(alternatives, slack):
    """The default costs 1; the alternatives cost anything, from step to step."""
    bandit, total = Bandit(3, slack), 0.0
    for costs in alternatives:
        choice = bandit.choose()
        cost = [1.0, *costs][choice]
        bandit.record(choice, cost, 1)
        total += cost
    assert total <= (1 + slack) * len(alternatives) + 5 + 1e-6, "beyond one step of the dearest kind"


def test_an_adversary_that_waits_for_trust():
    """Costs are low until there is credit, then high: the credit is small."""
    bandit = Bandit(2, 0.1)
    for _ in range(200):
        choice = bandit.choose()
        bandit.record(choice, 0.5 if choice else 1.0, 1)
        assert bandit.debt >= -1.01 * CREDIT
    total = 0.0
    for _ in range(200):
        choice = bandit.choose()
        cost = 3.0 if choice else 1.0
        bandit.record(choice, cost, 1)
        total += cost
    assert total <= 1.1 * 200 + CREDIT + 3


def test_cost_is_per_unit_of_work():
    """A choice that does a tenth of the work in a fifth of the time is slower."""
    bandit = Bandit(2)
    chosen = []
    for _ in range(300):
        choice = bandit.choose()
        bandit.record(choice, (1.0, 0.2)[choice], (10, 1)[choice])
        chosen.append(choice)
    assert sum(chosen) < 30
