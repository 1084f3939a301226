"""Shards of a model: the layers that one stage of one replica holds, divided over the devices of its mesh."""

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
from qwen_jax.parallel.layout import Layout, expand
from qwen_jax.parallel.mesh import TENSOR, plan_meshes, spec_of
from qwen_jax.parallel.placement import put
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Precision, Ranges

# Number of tokens in a step from which the hidden states between products are divided over the tokens: below, a
# collective takes as long as its latency, and one collective is better than two.
SCATTER_FROM = 1024
# Number of tokens from which each row's tokens go through the layers in two halves, each large enough to fill the
# devices' products; 0 for platforms that do not compute while they exchange.
OVERLAP_FROM = {"cpu": 0, "gpu": 2048, "tpu": 2048}
EMBED, HEAD = "embed.weight", "head.weight"


@dataclass(frozen=True)
class ModelShard:
    """Consecutive layers of a model on one mesh, whose devices divide every parameter by a layout.

    Attributes:
      layout: how the parameters are divided over the mesh's one axis, ``tensor``.
      start, end: the layers ``[start:end]``. The first shard of a replica also has the embedding, the last one the norm
        and the head.
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
    def device_config(self) -> ModelConfig:
        """Config of the network that one device computes: the shard's layers, with a part of the heads and MLP."""
        return replace(self.layout.local, num_layers=self.end - self.start)

    @cached_property
    def padded_config(self) -> ModelConfig:
        """Config of what the shard's devices hold together, with the heads and MLP columns that only pad."""
        return replace(self.device_config, num_kv_heads=self.layout.slots,
                       num_heads=self.layout.slots * self.layout.group, intermediate_size=self.layout.mlp)

    def names(self, path: str) -> list[str]:
        """Return the names that a parameter of the model has in this shard; none when the shard does not have it.

        Layers are numbered from the shard's first. A tied head that is not on the embedding's devices is a copy of the
        embedding under a second name.
        """
        if path.startswith("layers."):
            _, index, rest = path.split(".", 2)
            return [f"layers.{int(index) - self.start}.{rest}"] if self.start <= int(index) < self.end else []
        if path == EMBED:
            copied = self.last and not self.first and self.layout.config.tie_word_embeddings
            return [EMBED] * self.first + [HEAD] * copied
        return [path] if self.last else []

    def sharding(self, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
        """Return the sharding of an array that has this padded shape and these logical axes."""
        return NamedSharding(self.mesh, spec_of(tuple(axes), tuple(shape), self.mesh))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, value: Any, axes: Sequence[str]) -> Any:
        """Put an array that is padded for the layout on this shard's devices, divided by its logical axes.

        value: the array, or its shape, for which the shape and sharding on the devices are returned.
        """
        return put(value, self.sharding(axes, value.shape))

    def build(self, params: Mapping[str, Any]) -> Qwen2:
        """Return the network of one device around parameters that have the shard's own names."""
        return build(self._tied_config, params, partition=self.partition, first=self.first, last=self.last)

    def build_block(self, params: Mapping[str, Any], start: int, end: int) -> Qwen2:
        """Return the network of the shard's layers ``[start:end]`` on one device, around the shard's parameters."""
        own = {f"layers.{index - start}.{rest}": value for path, value in params.items() if path.startswith("layers.")
               for _, index, rest in [path.split(".", 2)] for index in [int(index)] if start <= index < end}
        return build(replace(self.device_config, num_layers=end - start), own, partition=self.partition, first=False,
                     last=False)

    def build_ends(self, params: Mapping[str, Any]) -> Qwen2:
        """Return the network of one device without its layers: the embedding, the norm and the head that it has.

        Its config has the number of layers of the whole model.
        """
        own = {path: value for path, value in params.items() if not path.startswith("layers.")}
        return build(replace(self._tied_config, num_layers=self.layout.config.num_layers), own,
                     partition=self.partition, first=self.first, last=self.last, layers=False)

    @property
    def _tied_config(self) -> ModelConfig:
        """Config of one device's network, in which the head is tied only where the embedding is on the same devices."""
        tied = self.device_config.tie_word_embeddings and self.first
        return replace(self.device_config, tie_word_embeddings=tied) if self.last else self.device_config

    def precision(self, precision: Precision) -> Precision:
        """Return the precision (which parameters and pages are 8-bit) of this shard's layers, out of the model's."""
        layers = slice(self.start, self.end)
        return replace(precision, weights=precision.weights[layers], kv_cache=precision.kv_cache[layers])

    def ranges(self, ranges: tuple[Ranges, ...] | None) -> tuple[Ranges, ...] | None:
        """Return the calibrated ranges of this shard's layers' keys and values, padded to the layout's KV heads."""
        axes = ("kv_heads", "head_dim")
        return ranges and tuple(Ranges(*(expand(np.asarray(x), axes, self.layout) for x in layer))
                                for layer in ranges[self.start:self.end])


def shards_of(plan: ParallelPlan) -> list[ModelShard]:
    """Return the shards of a plan: the stages of the first replica, then the stages of the next one, and so on."""
    return [ModelShard(mesh, plan.layout, start, start + count) for replica in plan_meshes(plan)
            for mesh, start, count in zip(replica, plan.first_layers, plan.stages, strict=True)]


def shards_with(shards: Sequence[ModelShard], path: str) -> Iterator[tuple[int, str]]:
    """Yield the index of every shard that has a parameter, with the parameter's name (or each name) there."""
    return ((index, name) for index, shard in enumerate(shards) for name in shard.names(path))
