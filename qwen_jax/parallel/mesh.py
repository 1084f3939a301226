"""Meshes of devices, and the one table that says which axis of an array is split over which axis of a mesh.

Axes are Auto: XLA's partitioner propagates the parameters' shardings through the program and inserts the collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax.errors import UserError

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


def spec_of(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How an array with these logical axes is split; an axis that does not divide evenly stays whole."""
    return PartitionSpec(*(RULES[axis] if axis in RULES and size % mesh.shape[RULES[axis]] == 0 else None
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
