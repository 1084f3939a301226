"""Division of a model's parameters over an engine's devices, and the arrays that each shard's programs take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.engine.weights.model_shard import ModelShard, shards_with
from qwen_jax.engine.weights.network_part import NetworkPart, network_part
from qwen_jax.errors import UserError
from qwen_jax.model import abstract, params_of
from qwen_jax.parallel.layout import contract, expand, expanded_shape
from qwen_jax.parallel.placement import Placement, place
from qwen_jax.quantization import Precision, Ranges, scales_of

Leaves = tuple[jax.Array, ...]  # of one shard
ShardedLeaves = tuple[Leaves, ...]  # of every shard
_SCALE_AXES = ("kv_heads", "head_dim")  # of the scales of 8-bit pages


class WeightSharding:
    """The shards of a model, and the conversion between named parameters and the arrays that their programs take.

    A parameter that several shards have is read by the first of these and copied to the others.

    Attributes:
      shards: shards of all replicas.
      dtype: element type of the parameters that are not 8-bit.
      precision: which parameters and pages are 8-bit.
      specs: shape, type and logical axes of every parameter of the model, by path.
      graphs: graph definition of each shard's network, as ``nnx.split`` gives it.
      treedefs: tree structure of each shard's arrays: the network's state and the scales of 8-bit pages.
      shapes: shapes and shardings of each shard's arrays, in the order of the tree structure.
    """

    def __init__(self, config: ModelConfig, dtype: Any, shards: Sequence[ModelShard], precision: Precision,
                 ranges: tuple[Ranges, ...] | None = None) -> None:
        self.shards, self.dtype, self.precision, self._ranges = tuple(shards), jnp.dtype(dtype), precision, ranges
        if precision.format == "int4" and any(shard.layout.tensor > 1 for shard in self.shards):
            raise UserError("int4 weights cannot be divided over several devices: use weights='int8', or tp_size=1")
        self.specs = abstract(config, self.dtype)
        self._owners = {path: next(shards_with(shards, path))[0] for path in self.specs}
        shapes = self.by_shard((path, self.place(path, jax.ShapeDtypeStruct(spec.shape, spec.dtype)))
                               for path, spec in self.specs.items())
        self._expected = {path: (value.shape, value.dtype) for path, value in self._from_owners(shapes)}
        self.graphs, self.treedefs, self.shapes = [], [], []
        self._named_shapes: dict[int, tuple[dict[str, Any], Any]] = {}
        for shard, params in zip(self.shards, shapes, strict=True):
            graph, state = nnx.split(shard.build(params))
            leaves, treedef = jax.tree.flatten((state, self._scales(shard, params)))
            self.graphs.append(graph)
            self.treedefs.append(treedef)
            self.shapes.append(tuple(leaves))

    @cached_property
    def placements(self) -> dict[str, Placement]:
        """Sharding, element type and padding, by path, of every parameter on the first shard that has it."""
        layout, placements = self.shards[0].layout, {}
        for path, spec in self.specs.items():
            shape = expanded_shape(spec.shape, spec.axes, layout)
            sharding = self.shards[self._owners[path]].sharding(spec.axes, shape)
            changed = partial(expand, axes=spec.axes, layout=layout) if shape != spec.shape else None
            placements[path] = Placement(sharding, self.dtype, self.precision.inputs(path), changed,
                                         self.precision.weight_dtype(path))
        return placements

    def place(self, path: str, value: Any) -> Any:
        """Put a parameter of the model, padded and cast, on the devices of the first shard that has it.

        value: the parameter, or its shape, for which the shape and sharding on the devices are returned.
        """
        return place(value, self.placements[path])

    def by_shard(self, placed: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Copy parameters that `place` returned to all shards that have them; return each shard's by its own names."""
        params: list[dict[str, Any]] = [{} for _ in self.shards]
        for path, value in placed:
            self.insert(params, path, value)
        return params

    def insert(self, params: list[dict[str, Any]], path: str, value: Any) -> None:
        """Copy a placed parameter to every shard that has it, in place of the parameter that ``params`` had there."""
        for index, name in shards_with(self.shards, path):
            params[index][name] = self.shards[index].put(value, self.specs[path].axes)

    def whole(self, index: int) -> NetworkPart:
        """Return the whole network of a shard, given by its number."""
        return NetworkPart(self.graphs[index], self.treedefs[index], tuple(range(len(self.shapes[index]))))

    def block(self, index: int, start: int, end: int) -> NetworkPart:
        """Return the layers ``[start:end]`` of a shard, counted from the shard's first, as a part of its network."""
        params, scales = self._parts_of_shapes(index)
        return network_part(self.shards[index].build_block(params, start, end), tuple(scales[start:end]),
                            self.shapes[index])

    def ends(self, index: int) -> NetworkPart:
        """Return what a shard has beside its layers, embedding, norm and head, as a part of its network."""
        params, _ = self._parts_of_shapes(index)
        return network_part(self.shards[index].build_ends(params), (), self.shapes[index])

    def layer_kinds(self, index: int) -> list[str]:
        """Return for each layer of a shard a text that is the same for layers of equal shapes and element types."""
        params, scales = self._parts_of_shapes(index)
        kinds = [[repr(scale is None)] for scale in scales]
        for path, value in params.items():
            if path.startswith("layers."):
                _, layer, rest = path.split(".", 2)
                kinds[int(layer)].append(f"{rest} {[(x.shape, x.dtype) for x in jax.tree.leaves(value)]}")
        return ["; ".join(sorted(kind)) for kind in kinds]

    def _parts_of_shapes(self, index: int) -> tuple[dict[str, Any], Any]:
        """Return the shapes of a shard's parameters by name, and those of the scales of its layers' 8-bit pages."""
        if index not in self._named_shapes:  # every block asks for them
            state, scales = jax.tree.unflatten(self.treedefs[index], self.shapes[index])
            self._named_shapes[index] = params_of(nnx.merge(self.graphs[index], state)), scales
        return self._named_shapes[index]

    def leaves(self, params: Sequence[Mapping[str, Any]]) -> ShardedLeaves:
        """Return the flat tuple of arrays of every shard, as its programs take them, from the shards' parameters.

        UserError when a parameter has not the model's shape and type.
        """
        wrong = [f"{path} {tuple(value.shape)} {value.dtype} for {self._expected[path][0]} {self._expected[path][1]}"
                 for path, value in self._from_owners(params) if (value.shape, value.dtype) != self._expected[path]]
        if wrong:
            raise UserError(f"parameters of another shape or type: {'; '.join(wrong[:8])}")
        return tuple(tuple(jax.tree.leaves((nnx.split(shard.build(own))[1], self._scales(shard, own))))
                     for shard, own in zip(self.shards, params, strict=True))

    def by_name(self, version: ShardedLeaves) -> list[dict[str, Any]]:
        """Return each shard's parameters by the shard's own names: the inverse of `leaves`."""
        return [params_of(nnx.merge(graph, jax.tree.unflatten(treedef, leaves)[0]))
                for graph, treedef, leaves in zip(self.graphs, self.treedefs, version, strict=True)]

    def resharded(self, version: ShardedLeaves, before: WeightSharding) -> ShardedLeaves:
        """Return the arrays of a version of the weights, moved from the devices and layout of ``before`` to this one's.

        Nothing is computed, so nothing compiles: where the layouts differ, arrays pass through the host one at a time.
        """
        old_params, scales = before.by_name(version), before._scales_of_layers(version)
        del version  # with the names popped below, each array is freed as soon as it has been copied
        params: list[dict[str, Any]] = [{} for _ in self.shards]
        for path, spec in self.specs.items():
            value, *_ = [old_params[index].pop(name) for index, name in shards_with(before.shards, path)]
            self.insert(params, path, self._relaid(value, spec.axes, before))

        def scales_on(shard: ModelShard) -> Any:
            return jax.tree.map(lambda x: shard.put(_positive(self._relaid(x, _SCALE_AXES, before)), _SCALE_AXES),
                                tuple(scales[shard.start:shard.end]))

        return tuple(tuple(jax.tree.leaves((nnx.split(shard.build(own))[1], scales_on(shard))))
                     for shard, own in zip(self.shards, params, strict=True))

    def _relaid(self, value: Any, axes: Sequence[str], before: WeightSharding) -> Any:
        """Return an array that is padded for the layout of ``before``, padded for this layout instead.

        The array itself where the layouts are the same.
        """
        new, old = self.shards[0].layout, before.shards[0].layout
        if replace(new, tensor=1) == replace(old, tensor=1):
            return value
        return expand(contract(jax.tree.map(np.asarray, value), axes, old), axes, new)

    def _scales_of_layers(self, version: ShardedLeaves) -> list[Any]:
        """Return for every layer of the model the scales of its 8-bit pages, as the last replica holds them."""
        scales: list[Any] = [None] * self.shards[0].layout.config.num_layers
        for shard, treedef, leaves in zip(self.shards, self.treedefs, version, strict=True):
            scales[shard.start:shard.end] = jax.tree.unflatten(treedef, leaves)[1]
        return scales

    def _from_owners(self, params: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
        """Yield (path, value) of every parameter, with the value on the first shard that has it."""
        for path, index in self._owners.items():
            yield path, params[index][self.shards[index].names(path)[0]]

    def _scales(self, shard: ModelShard, params: Mapping[str, Any]) -> Any:
        """Return the scales of the 8-bit pages of a shard's layers, on its devices."""
        scales = scales_of(params, shard.precision(self.precision), shard.ranges(self._ranges))
        return jax.tree.map(lambda x: shard.put(x, _SCALE_AXES), scales)


def _positive(scale: Any) -> Any:
    """Return the scales of 8-bit pages with 1 in place of the zeros of padding heads: values are divided by scales."""
    return np.where(scale == 0, 1, scale).astype(scale.dtype) if isinstance(scale, np.ndarray) else scale
