"""Plans as data."""

import pytest

from qwen_jax.config import PRESETS
from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import make_plan, split_layers

SEVEN = PRESETS["qwen2.5-7b"]


def test_layers_are_shared_out_evenly_and_the_last_stage_has_no_more_than_others():
    assert split_layers(28, 1) == (28,) and split_layers(28, 4) == (7, 7, 7, 7)
    assert split_layers(29, 2) == (15, 14) and split_layers(30, 4) == (7, 8, 8, 7)
    assert split_layers(31, 4) == (8, 8, 8, 7)
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            split = split_layers(layers, stages)
            assert sum(split) == layers and len(split) == stages and max(split) - min(split) <= 1
            assert split[-1] == min(split) and split[0] <= max(split)


def test_a_plan_knows_its_devices_and_layers():
    plan = make_plan(SEVEN, data=2, stage=3, tensor=2)
    assert plan.devices == 12 and plan.tensor == 2 and plan.first_layers == (0, 9, 19)
    assert str(plan) == "data=2 stage=3 tensor=2"


@pytest.mark.parametrize("sizes", [{"data": 0}, {"stage": -1}, {"stage": 29}, {"tensor": 0}, {"data": True}])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(UserError):
        make_plan(SEVEN, **sizes)
