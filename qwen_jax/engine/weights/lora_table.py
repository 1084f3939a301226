"""LoRA adapters of a running engine, in slots of arrays on the devices, so that loading an adapter compiles nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.contents import digest_of
from qwen_jax.engine.compiled.compile_counter import planned
from qwen_jax.engine.compiled.lora_rows import NO_ADAPTER, Adapters
from qwen_jax.engine.weights.model_shard import ModelShard
from qwen_jax.errors import UnknownAdapter, UserError
from qwen_jax.model.lora import TARGETS, split_axes, target_sizes
from qwen_jax.parallel.layout import expand, expanded_shape
from qwen_jax.parallel.placement import put


class AdapterTable:
    """The LoRA adapters that one engine has loaded, by name, each in a slot of arrays on the devices.

    Args:
      shards: shards of the model. Each holds the adapters of its own layers, divided as the matrices beside them are.
      max_adapters: how many may be loaded at once; 0 makes an engine whose programs have no adapters.
      max_rank: the largest rank; adapters of a smaller rank are padded with zeros.

    Attributes:
      digests: name of each loaded adapter -> digest of what was loaded: rank, scale and matrices.
    """

    def __init__(self, config: ModelConfig, shards: Sequence[ModelShard], max_adapters: int, max_rank: int,
                 dtype: Any) -> None:
        for name, value, minimum in (("max_adapters", max_adapters, 0), ("max_adapter_rank", max_rank, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise UserError(f"{name} must be an integer of at least {minimum}, not {value!r}")
        self._config, self._shards, self._max_rank = config, tuple(shards), max_rank
        self._slots: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        self._free = list(range(max_adapters, NO_ADAPTER, -1))
        self._loads, self._identities = 0, {}
        self._users = dict.fromkeys(self._free, 0)
        self.values: tuple[Adapters | None, ...] = (None,) * len(self._shards)
        if max_adapters:
            count, sizes = max_adapters + 1, target_sizes(config)
            self._host = [{f"{target}.{factor}": np.zeros((count, max_rank, sizes[target][0]) if factor == "a" else
                                                          (count, sizes[target][1], max_rank), jnp.dtype(dtype))
                           for target in TARGETS for factor in "ab"} for _ in range(config.num_layers)]
            self._scale = np.zeros(count, np.float32)
            self._put()

    @property
    def identity_of_shapes(self) -> tuple[int, int]:
        """Number of slots and largest rank of adapters: their shapes in compiled programs depend on these alone."""
        return len(self._users), self._max_rank

    @property
    def max_adapters(self) -> int:
        """Number of adapters that may be loaded at once."""
        return len(self._users)

    @property
    def names(self) -> list[str]:
        return sorted(self._slots)

    def load(self, name: str, folder: str | Path) -> None:
        """Read a PEFT adapter and make it available as ``name``; nothing changes when it cannot be used."""
        from qwen_jax.checkpoint.adapters import load_adapter

        if not self._users:
            raise UserError("this engine takes no adapters: make it with max_adapters=1 or more")
        if name in self._slots:
            raise UserError(f"an adapter named {name!r} is loaded: unload it first")
        if not self._free:
            raise UserError(f"all {len(self._slots)} adapter slots are taken: unload one, or raise max_adapters")
        with planned():  # reading tensors as JAX arrays compiles
            lora, adapter = load_adapter(folder, self._config)
        if lora.rank > self._max_rank:
            raise UserError(f"the adapter in {folder} has rank {lora.rank}, this engine takes {self._max_rank}: raise "
                            "max_adapter_rank")
        slot = self._free[-1]
        try:
            self._fill(slot, adapter, lora.rank, lora.scale)
            self._put()
        except BaseException:
            self._fill(slot, {}, 0, 0.0)
            raise
        self._slots[name] = self._free.pop()
        self._loads += 1
        self._identities[slot] = self._loads
        self.digests[name] = digest_of((lora, [(key, digest_of(adapter[key].tobytes())) for key in sorted(adapter)]))

    def unload(self, name: str) -> None:
        """Remove an adapter and free its slot. UserError while requests use it."""
        slot = self._slot(name)
        if self._users[slot]:
            raise UserError(f"{self._users[slot]} requests use the adapter {name!r}: wait for them, or abort them")
        del self._slots[name], self.digests[name]
        self._free.append(slot)
        self._fill(slot, {}, 0, 0.0)
        self._put()

    def acquire(self, name: str | None) -> int:
        """Return the slot of an adapter (None: no adapter), and keep it loaded until `release`."""
        if name is None:
            return NO_ADAPTER
        slot = self._slot(name)
        self._users[slot] += 1
        return slot

    def identity(self, slot: int) -> int:
        """Return a number of the adapter in a slot that no other adapter of this engine has or had.

        Names and slots may be used again.
        """
        return self._identities.get(slot, 0)

    def release(self, slot: int) -> None:
        """End one request's use of the slot that `acquire` returned."""
        if slot != NO_ADAPTER:
            self._users[slot] -= 1

    def check(self, name: str) -> None:
        """Raise UserError when no adapter of this name is loaded."""
        self._slot(name)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise UnknownAdapter(f"no adapter named {name!r} is loaded; loaded: {', '.join(self.names) or 'none'}")
        return self._slots[name]

    def _fill(self, slot: int, adapter: Mapping[str, np.ndarray], rank: int, scale: float) -> None:
        """Write an adapter's matrices to a slot, zeros where it has none, on the host alone: see `_put`."""
        for index, layer in enumerate(self._host):
            for name, values in layer.items():
                values[slot] = 0
                if name in adapter:
                    used = (slot, slice(rank)) if name.endswith(".a") else (slot, slice(None), slice(rank))
                    values[used] = adapter[name][index]
        self._scale[slot] = scale

    def rearrange(self, shards: Sequence[ModelShard]) -> None:
        """Move the adapters to the devices of other shards of the model."""
        self._shards, self.values = tuple(shards), (None,) * len(shards)
        if self._users:
            self._put()

    def shapes(self, shard: ModelShard) -> Adapters | None:
        """Return the shapes and shardings of the adapter arrays on a shard; None for an engine without adapters."""
        if not self._users:
            return None
        layers = tuple({name: self._on_shard(shard, name, jax.ShapeDtypeStruct(values.shape, values.dtype))
                        for name, values in layer.items()} for layer in self._host[shard.start:shard.end])
        return Adapters(layers, jax.ShapeDtypeStruct(self._scale.shape, np.float32, sharding=shard.replicated))

    def _put(self) -> None:
        """Send all slots to the devices."""
        # Copies: on CPU a device array may share the host's memory, and a step that runs must keep its values.
        self.values = tuple(Adapters(
            tuple({name: self._on_shard(shard, name, values.copy()) for name, values in layer.items()}
                  for layer in self._host[shard.start:shard.end]),
            put(self._scale.copy(), shard.replicated)) for shard in self._shards)

    def _on_shard(self, shard: ModelShard, name: str, values: Any) -> Any:
        """Put one matrix of every slot's adapter, ``[S, r, I]`` or ``[S, O, r]``, on a shard's devices.

        values: the matrices, or their shape, for which the shape and sharding on the devices are returned.
        """
        target, _, factor = name.rpartition(".")
        names, sizes = zip(*split_axes(self._config, target)[factor == "b"], strict=True)
        axes = ("slot", "rank", *names) if factor == "a" else ("slot", *names, "rank")
        before, after = values.shape[:2 if factor == "a" else 1], values.shape[3 if factor == "a" else 2:]
        # The flattened axis is divided as the first of the axes in it.
        flat = ("slot", "rank", names[0]) if factor == "a" else ("slot", names[0], "rank")
        if isinstance(values, jax.ShapeDtypeStruct):
            size = prod(expanded_shape(sizes, names, shard.layout))
            return shard.put(jax.ShapeDtypeStruct((*before, size, *after), values.dtype), flat)
        expanded = expand(values.reshape(*before, *sizes, *after), axes, shard.layout)
        return shard.put(expanded.reshape(*before, -1, *after), flat)
