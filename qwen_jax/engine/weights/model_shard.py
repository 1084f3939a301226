"""The parts of a model that an engine's devices hold: one for every stage of every replica."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.model import Qwen2, build
from qwen_jax.model.partition import WHOLE, Partition
from qwen_jax.parallel.layout import Layout, expand, expanded_shape
from qwen_jax.parallel.mesh import TENSOR, plan_meshes, spec_of
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Precision, Ranges

# Tokens in a step from which the hidden states between products are divided over the tokens: below, a collective takes
# as long as its latency, and one is better than two.
SCATTER_FROM = 1024
# And from which each row's tokens go through the layers in two halves, each of which still fills the devices' products;
# 0 where devices do not compute while they exchange.
OVERLAP_FROM = {"cpu": 0, "gpu": 2048, "tpu": 2048}
EMBED, HEAD = "embed.weight", "head.weight"


@dataclass(frozen=True)
class ModelShard:
    """Some layers of a model on the devices of one mesh, which divide them by a layout.

    Attributes:
      layout: of the parameters over the mesh's one axis, ``tensor``.
      start, end: its layers. The first part of a replica also has the embedding, the last one the norm and the head.
    """

    mesh: Mesh
    layout: Layout
    start: int
    end: int

    @property
    def first(self) -> bool:
        return self.start == 0

    @property
    def last(self) -> bool:
        return self.end == self.layout.config.num_layers

    @property
    def devices(self) -> list[jax.Device]:
        return list(self.mesh.devices.flat)

    @cached_property
    def partition(self) -> Partition:
        if self.layout.tensor == 1:
            return WHOLE
        return Partition(TENSOR, self.layout.tensor, SCATTER_FROM, OVERLAP_FROM[self.devices[0].platform])

    @cached_property
    def local(self) -> ModelConfig:
        """What one device computes, as a model of its own."""
        return replace(self.layout.local, num_layers=self.end - self.start)

    @cached_property
    def held(self) -> ModelConfig:
        """What the devices hold together, padding included."""
        return replace(self.local, num_kv_heads=self.layout.slots, num_heads=self.layout.slots * self.layout.group,
                       intermediate_size=self.layout.mlp)

    def names(self, path: str) -> list[str]:
        """What this part calls a parameter of the model; none when it does not have it. A tied head that is not on the
        embedding's devices is a copy of it."""
        if path.startswith("layers."):
            _, index, rest = path.split(".", 2)
            return [f"layers.{int(index) - self.start}.{rest}"] if self.start <= int(index) < self.end else []
        if path == EMBED:
            copied = self.last and not self.first and self.layout.config.tie_word_embeddings
            return [EMBED] * self.first + [HEAD] * copied
        return [path] if self.last else []

    def sharding(self, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
        """Of an array of this (padded) shape and with these logical axes."""
        return NamedSharding(self.mesh, spec_of(tuple(axes), tuple(shape), self.mesh))

    @property
    def replicated(self) -> NamedSharding:
        """The same array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, value: Any, axes: Sequence[str]) -> Any:
        """An array of the model, or the shape of one, as this part holds it: expanded and divided."""
        leaves = jax.tree.leaves(value)
        if isinstance(leaves[0], jax.ShapeDtypeStruct):
            return self.moved(jax.tree.map(lambda x: jax.ShapeDtypeStruct(
                expanded_shape(x.shape, axes[:x.ndim], self.layout), x.dtype), value), axes)
        if expanded_shape(leaves[0].shape, axes, self.layout) != leaves[0].shape:
            value = expand(jax.tree.map(np.asarray, value), axes, self.layout)
        return self.moved(value, axes)

    def moved(self, value: Any, axes: Sequence[str]) -> Any:
        """An expanded array, or the shape of one, onto this part's devices."""
        def one(x):  # the scales of 8-bit values have the first of their axes
            sharding = self.sharding(axes[:x.ndim], x.shape)
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            return put_global(x, sharding)

        return jax.tree.map(one, value)

    def build(self, params: Mapping[str, Any]) -> Qwen2:
        """The network of one device around this part's parameters, by its own names."""
        tied = self.local.tie_word_embeddings and self.first
        config = replace(self.local, tie_word_embeddings=tied) if self.last else self.local
        return build(config, params, self.partition, self.first, self.last)

    def precision(self, precision: Precision) -> Precision:
        """Of this part's layers."""
        layers = slice(self.start, self.end)
        return replace(precision, weights=precision.weights[layers], kv_cache=precision.kv_cache[layers])

    def ranges(self, ranges: tuple[Ranges, ...] | None) -> tuple[Ranges, ...] | None:
        """Of this part's layers, one row for every KV slot."""
        axes = ("kv_heads", "head_dim")
        return ranges and tuple(Ranges(*(expand(np.asarray(x), axes, self.layout) for x in one))
                                for one in ranges[self.start:self.end])


def put_global(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array onto devices, also where some are another process's: there ``x`` is a host's own, whole array."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if x.sharding != sharding:
            raise NotImplementedError("moving an array of several processes")
        return x
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def shards_of(plan: ParallelPlan) -> list[ModelShard]:
    """The stages of the first replica, then those of the next."""
    return [ModelShard(mesh, plan.layout, start, start + count) for replica in plan_meshes(plan)
            for mesh, start, count in zip(replica, plan.first_layers, plan.stages, strict=True)]


def held_by(parts: Sequence[ModelShard], path: str) -> Iterator[tuple[int, str]]:
    """The parts that have a parameter, by their place in ``parts``, and their names for it."""
    return ((index, name) for index, part in enumerate(parts) for name in part.names(path))
