"""Meshes of devices, and the one table that says which axis of an array is split over which axis of a mesh.

Axes are Auto. Training leaves the collectives to XLA's partitioner, which propagates the parameters' shardings through
the program. The engine's steps run in a ``shard_map`` over ``tensor``, where the model says which there are
(`model.partition`); its ``data`` and ``stage`` axes are meshes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import ParallelPlan

DATA, TENSOR = "data", "tensor"
# Logical axis of a parameter (see model.abstract) -> mesh axis. Tensor parallelism in Megatron's way: whole KV groups,
# columns of the MLP's first product and rows of its second, the vocabulary of embedding and head. All else is whole
# on every device.
RULES = {"kv_heads": TENSOR, "mlp": TENSOR, "vocab": TENSOR}


def make_mesh(data: int = 1, tensor: int = 1) -> Mesh:
    """The first ``data * tensor`` devices; neighbours share the tensor axis. UserError when there are too few."""
    devices = jax.devices()
    if data * tensor > len(devices):
        raise UserError(f"a mesh of data={data} times tensor={tensor} needs {data * tensor} devices, and there are "
                        f"{len(devices)}")
    return jax.make_mesh((data, tensor), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2,
                         devices=devices[:data * tensor])


def plan_meshes(plan: ParallelPlan) -> list[list[Mesh]]:
    """A mesh with the one axis ``tensor`` for every stage of every replica, ``[replica][stage]``, of the first devices.
    Neighbours share the tensor axis: they exchange the most, and come first on one host. UserError when there are too
    few devices."""
    devices = jax.devices()
    if plan.devices > len(devices):
        raise UserError(f"the plan {plan} needs {plan.devices} devices and there {_are(len(devices))}: lower an axis")
    grid = np.array(devices[:plan.devices], object).reshape(plan.data, len(plan.stages), plan.tensor)
    return [[Mesh(stage, (TENSOR,), axis_types=(AxisType.Auto,)) for stage in replica] for replica in grid]


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"


def spec_of(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, str] = RULES
            ) -> PartitionSpec:
    """How an array with these logical axes is split; an axis that does not divide evenly stays whole.

    UserError when the rules name an axis that the mesh does not have.
    """
    unknown = sorted(set(rules.values()) - set(mesh.shape))
    if unknown:
        raise UserError(f"the sharding rules name the mesh axis {', '.join(unknown)}, and the mesh has "
                        f"{', '.join(mesh.shape)}: correct the rule")
    return PartitionSpec(*(rules[axis] if axis in rules and size % mesh.shape[rules[axis]] == 0 else None
                           for axis, size in zip(axes, shape, strict=True)))


def shardings_of(tree: Any, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> Any:
    """A sharding for every leaf of a tree whose dictionaries are keyed by parameter.

    A leaf below the key ``name`` is split as ``specs[name]`` says, others are whole on every device. So an optimiser's
    moments are split as their parameters are.
    """
    def of_leaf(path, _leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
        return NamedSharding(mesh, specs[names[-1]] if names else PartitionSpec())

    return jax.tree_util.tree_map_with_path(of_leaf, tree)
