"""Meshes of devices, and the table of rules that says which axis of an array is split over which axis of a mesh.

Axes are Auto. Training leaves the collectives to XLA's partitioner, which propagates the parameters' shardings through
the program. The engine's steps run in a ``shard_map`` over ``tensor``, with the collectives that the model names
(`model.partition`); replicas and stages have meshes of their own.
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
# Mesh axis of each logical axis of a parameter (see model.abstract). Tensor parallelism as in Megatron: whole KV
# groups, columns of the MLP's first product and rows of its second, the vocabulary of embedding and head. All else is
# whole on every device.
RULES = {"kv_heads": TENSOR, "mlp": TENSOR, "vocab": TENSOR}


def make_mesh(data: int = 1, tensor: int = 1) -> Mesh:
    """Make a mesh of the first ``data * tensor`` devices; neighbours share the tensor axis.

    Raises UserError when there are too few devices.
    """
    devices = jax.devices()
    if data * tensor > len(devices):
        raise UserError(f"a mesh of data={data} times tensor={tensor} needs {data * tensor} devices, and there "
                        f"{_are(len(devices))}: lower an axis")
    return jax.make_mesh((data, tensor), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2,
                         devices=devices[:data * tensor])


def plan_meshes(plan: ParallelPlan) -> list[list[Mesh]]:
    """Make a mesh with the single axis ``tensor`` for every stage of every replica, ``[replica][stage]``.

    It takes the first devices. Neighbours share the tensor axis: they exchange the most, and lie on the same host.
    Raises UserError when there are too few devices.
    """
    devices = jax.devices()
    if plan.devices > len(devices):
        raise UserError(f"the plan {plan} needs {plan.devices} devices and there {_are(len(devices))}: lower an axis")
    grid = np.array(devices[:plan.devices], object).reshape(plan.data, len(plan.stages), plan.tensor)
    return [[Mesh(stage, (TENSOR,), axis_types=(AxisType.Auto,)) for stage in replica] for replica in grid]


def _are(count: int) -> str:
    """Return "is 1" or "are N", for a message about a count of devices."""
    return f"is {count}" if count == 1 else f"are {count}"


def spec_of(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the partition spec that `RULES` give an array with these axes; one that does not divide stays whole."""
    return PartitionSpec(*(RULES[axis] if axis in RULES and size % mesh.shape[RULES[axis]] == 0 else None
                           for axis, size in zip(axes, shape, strict=True)))


def shardings_of(tree: Any, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> Any:
    """Return a sharding for every leaf of a tree whose dictionaries are keyed by parameter.

    A leaf below the key ``name`` is split as ``specs[name]`` says; other leaves are whole on every device. So an
    optimiser's moments are split as their parameters are.
    """
    def of_leaf(path, _leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
        return NamedSharding(mesh, specs[names[-1]] if names else PartitionSpec())

    return jax.tree_util.tree_map_with_path(of_leaf, tree)
