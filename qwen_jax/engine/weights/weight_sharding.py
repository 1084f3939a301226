"""How a model's parameters are spread over the devices of an engine: what each part holds, and as what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.engine.weights.model_shard import ModelShard, held_by
from qwen_jax.errors import UserError
from qwen_jax.model import abstract, params_of
from qwen_jax.parallel.layout import contract, expand, expanded_shape
from qwen_jax.quantization import Precision, Ranges, scales_of

Leaves = tuple[jax.Array, ...]  # of one part
ShardedLeaves = tuple[Leaves, ...]  # of every part


class WeightSharding:
    """The parts of a model, and how parameters become the arrays that each part's programs take.

    Attributes:
      parts: of all replicas. Where several have a parameter, the first of them reads it, and the others copy it.
      precision: which parameters are 8-bit; ranges: that were measured, for the scales of 8-bit pages.
      specs: shape, type and logical axes of every parameter of the model, by path.
      graphs, treedefs: of each part's network around its parameters, and of the tuple of arrays that it is split into.
    """

    def __init__(self, config: ModelConfig, dtype: Any, parts: Sequence[ModelShard], precision: Precision,
                 ranges: tuple[Ranges, ...] | None = None) -> None:
        self.parts, self.dtype, self.precision, self._ranges = tuple(parts), jnp.dtype(dtype), precision, ranges
        self.specs = abstract(config, self.dtype)
        self._owners = {path: next(held_by(parts, path))[0] for path in self.specs}
        shapes = self.all((path, self.stored(path, jax.ShapeDtypeStruct(spec.shape, spec.dtype)))
                          for path, spec in self.specs.items())
        self._held = {path: (value.shape, value.dtype) for path, value in self._first_of_each(shapes)}
        self.graphs, self.treedefs, self.shapes = [], [], []
        for part, own in zip(self.parts, shapes, strict=True):
            graph, state = nnx.split(part.build(own))
            leaves, treedef = jax.tree.flatten((state, self._scales(part, own)))
            self.graphs.append(graph)
            self.treedefs.append(treedef)
            self.shapes.append(tuple(leaves))

    @cached_property
    def shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        """Of every parameter, on the devices of the first part that has it."""
        return {path: self.parts[self._owners[path]].sharding(spec.axes, self._held[path][0])
                for path, spec in self.specs.items()}

    @cached_property
    def expansions(self) -> dict[str, Callable[[Any], Any]]:
        """What makes the array that is held from the model's, where these differ."""
        layout = self.parts[0].layout
        return {path: partial(expand, axes=spec.axes, layout=layout) for path, spec in self.specs.items()
                if expanded_shape(spec.shape, spec.axes, layout) != spec.shape}

    def stored(self, path: str, value: Any) -> Any:
        """A parameter of the model, an array or a shape, as the first part that has it holds it."""
        part, axes = self.parts[self._owners[path]], self.specs[path].axes
        return part.moved(self.precision.store(path, part.put(value, axes)), axes)

    def all(self, stored: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Every part's parameters by its own names, from what `stored` gives."""
        params: list[dict[str, Any]] = [{} for _ in self.parts]
        for path, value in stored:
            self.put(params, path, value)
        return params

    def put(self, params: list[dict[str, Any]], path: str, value: Any) -> None:
        """One of them, in the place of what was there."""
        for index, name in held_by(self.parts, path):
            params[index][name] = self.parts[index].moved(value, self.specs[path].axes)

    def leaves(self, params: Sequence[Mapping[str, Any]]) -> ShardedLeaves:
        """The arrays of every part. UserError when some are not of the model's shapes and types."""
        wrong = [f"{path} {tuple(value.shape)} {value.dtype} for {self._held[path][0]} {self._held[path][1]}"
                 for path, value in self._first_of_each(params) if (value.shape, value.dtype) != self._held[path]]
        if wrong:
            raise UserError(f"parameters of another shape or type: {'; '.join(wrong[:8])}")
        return tuple(tuple(jax.tree.leaves((nnx.split(part.build(own))[1], self._scales(part, own))))
                     for part, own in zip(self.parts, params, strict=True))

    def by_name(self, version: ShardedLeaves) -> list[dict[str, Any]]:
        """The inverse of `leaves`."""
        return [params_of(nnx.merge(graph, jax.tree.unflatten(treedef, leaves)[0]))
                for graph, treedef, leaves in zip(self.graphs, self.treedefs, version, strict=True)]

    def rearranged(self, other: WeightSharding, version: ShardedLeaves) -> ShardedLeaves:
        """A version that lies as ``other`` says, as this spread has it. Nothing is computed, so nothing compiles: where
        the layouts differ, arrays pass through the host, one at a time."""
        theirs, axes = other.by_name(version), ("kv_heads", "head_dim")
        params: list[dict[str, Any]] = [{} for _ in self.parts]
        for path, spec in self.specs.items():
            first, *copies = [theirs[index].pop(name) for index, name in held_by(other.parts, path)]
            del copies  # each is let go of as soon as it has been copied
            self.put(params, path, self._from(other, first, spec.axes))
        scales = other._scales_of_layers(version)

        def of(part: ModelShard):
            return jax.tree.map(lambda x: part.moved(_positive(self._from(other, x, axes)), axes),
                                tuple(scales[part.start:part.end]))

        return tuple(tuple(jax.tree.leaves((nnx.split(part.build(own))[1], of(part))))
                     for part, own in zip(self.parts, params, strict=True))

    def _from(self, other: WeightSharding, value: Any, axes: Sequence[str]) -> Any:
        """An array that is expanded for ``other``'s layout, for this one's; where these are the same, it itself."""
        mine, old = self.parts[0].layout, other.parts[0].layout
        if replace(mine, tensor=1) == replace(old, tensor=1):
            return value
        return expand(contract(jax.tree.map(np.asarray, value), axes, old), axes, mine)

    def _scales_of_layers(self, version: ShardedLeaves) -> list[Any]:
        """Of every layer of the model, from the first replica."""
        found: list[Any] = [None] * self.parts[0].layout.config.num_layers
        for part, treedef, leaves in zip(self.parts, self.treedefs, version, strict=True):
            found[part.start:part.end] = jax.tree.unflatten(treedef, leaves)[1]
        return found

    def _first_of_each(self, params: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
        """Path and value of every parameter, from the first part that has it."""
        for path, index in self._owners.items():
            yield path, params[index][self.parts[index].names(path)[0]]

    def _scales(self, part: ModelShard, own: Mapping[str, Any]) -> Any:
        scales = scales_of(own, part.precision(self.precision), part.ranges(self._ranges))
        return jax.tree.map(lambda x: part.moved(x, ("kv_heads", "head_dim")), scales)


def _positive(scale: Any) -> Any:
    """Scales of slots without a head, which `expand` makes 0, divide zeros: 1 does."""
    return np.where(scale == 0, 1, scale).astype(scale.dtype) if isinstance(scale, np.ndarray) else scale
