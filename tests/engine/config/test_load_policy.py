"""From plan to plan by load, and not to and fro."""

import pytest

from qwen_jax.config import PRESETS
from qwen_jax.engine.config.load_policy import LoadPolicy
from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import make_plan

SEVEN = PRESETS["qwen2.5-7b"]
FAST, BROAD = make_plan(SEVEN, tensor=4), make_plan(SEVEN, data=4)


def follow(policy, loads):
    """The plans over time, one load a second."""
    plan, seen = FAST, []
    for now, load in enumerate(loads):
        plan = policy.decide(plan, load, now) or plan
        seen.append(plan)
    return seen


def test_a_load_that_stays_changes_the_plan_once():
    seen = follow(LoadPolicy(FAST, BROAD, low=4, high=16, hold_seconds=3), [20] * 10 + [1] * 10)
    assert seen == [FAST] * 3 + [BROAD] * 10 + [FAST] * 7


def test_a_load_that_swings_changes_nothing():
    policy = LoadPolicy(FAST, BROAD, low=4, high=16, hold_seconds=3)
    assert set(follow(policy, [20, 20, 10] * 10)) == {FAST}
    assert set(follow(policy, [15, 5] * 10)) == {FAST}  # between the two loads
    assert follow(policy, [20] * 4 + [15, 5] * 10)[4:] == [BROAD] * 20


@pytest.mark.parametrize("settings", [{"low": 4, "high": 4}, {"low": -1, "high": 4},
                                      {"low": 1, "high": 2, "hold_seconds": -1}])
def test_bad_settings(settings):
    with pytest.raises(UserError):
        LoadPolicy(FAST, BROAD, **settings)
