"""How a model's parameters are spread over the devices of an engine: what each part holds, and as what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.engine.parts import Part, held_by
from qwen_jax.errors import UserError
from qwen_jax.model import abstract, params_of
from qwen_jax.parallel.layout import expand, expanded_shape
from qwen_jax.quantization import Precision, Ranges, scales_of

Leaves = tuple[jax.Array, ...]  # of one part
Version = tuple[Leaves, ...]  # of every part


class Spread:
    """The parts of a model, and how parameters become the arrays that each part's programs take.

    Attributes:
      parts: of all replicas. Where several have a parameter, the first of them reads it, and the others copy it.
      precision: which parameters are 8-bit; ranges: that were measured, for the scales of 8-bit pages.
      specs: shape, type and logical axes of every parameter of the model, by path.
      graphs, treedefs: of each part's network around its parameters, and of the tuple of arrays that it is split into.
    """

    def __init__(self, config: ModelConfig, dtype: Any, parts: Sequence[Part], precision: Precision,
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

    def leaves(self, params: Sequence[Mapping[str, Any]]) -> Version:
        """The arrays of every part. UserError when some are not of the model's shapes and types."""
        wrong = [f"{path} {tuple(value.shape)} {value.dtype} for {self._held[path][0]} {self._held[path][1]}"
                 for path, value in self._first_of_each(params) if (value.shape, value.dtype) != self._held[path]]
        if wrong:
            raise UserError(f"parameters of another shape or type: {'; '.join(wrong[:8])}")
        return tuple(tuple(jax.tree.leaves((nnx.split(part.build(own))[1], self._scales(part, own))))
                     for part, own in zip(self.parts, params, strict=True))

    def by_name(self, version: Version) -> list[dict[str, Any]]:
        """The inverse of `leaves`."""
        return [params_of(nnx.merge(graph, jax.tree.unflatten(treedef, leaves)[0]))
                for graph, treedef, leaves in zip(self.graphs, self.treedefs, version, strict=True)]

    def _first_of_each(self, params: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
        """Path and value of every parameter, from the first part that has it."""
        for path, index in self._owners.items():
            yield path, params[index][self.parts[index].names(path)[0]]

    def _scales(self, part: Part, own: Mapping[str, Any]) -> Any:
        scales = scales_of(own, part.precision(self.precision), part.ranges(self._ranges))
        return jax.tree.map(lambda x: part.moved(x, ("kv_heads", "head_dim")), scales)
