"""Meshes and the rules that divide arrays over them."""

import pytest
from jax.sharding import PartitionSpec

from qwen_jax.config import PRESETS
from qwen_jax.errors import UserError
from qwen_jax.parallel.mesh import make_mesh, plan_meshes, spec_of
from qwen_jax.parallel.plan import make_plan


def test_axes_are_split_by_the_rules_where_they_divide():
    mesh = make_mesh(data=2, tensor=4)
    assert spec_of(("kv_heads", "group", "embed"), (8, 7, 64), mesh) == PartitionSpec("tensor", None, None)
    assert spec_of(("kv_heads", "group", "embed"), (6, 7, 64), mesh) == PartitionSpec(None, None, None)


def test_neighbours_share_the_tensor_axis():
    config = PRESETS["qwen2.5-7b"]
    ids = [[[device.id for device in mesh.devices.flat] for mesh in replica]
           for replica in plan_meshes(make_plan(config, data=2, stage=2, tensor=2))]
    assert ids == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    with pytest.raises(UserError, match="needs 12 devices and there are 8: lower an axis"):
        plan_meshes(make_plan(config, data=2, stage=3, tensor=2))
