"""LoRA adapters of a running engine: slots on the device that hold other values after a load, so nothing compiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiled.compile_counter import planned
from qwen_jax.engine.compiled.lora_rows import NO_ADAPTER, Adapters
from qwen_jax.engine.weights.model_shard import ModelShard, put_global
from qwen_jax.errors import UserError
from qwen_jax.model.lora import TARGETS, split_axes, target_sizes
from qwen_jax.parallel.layout import expand, expanded_shape


class AdapterTable:
    """The adapters of one engine by name.

    Args:
      parts: of the model; each holds the adapters of its own layers, divided as the matrices beside them are.
      max_adapters: how many may be loaded at once; 0 makes an engine without adapters, whose programs know of none.
      max_rank: the largest rank; smaller ones are padded with zeros.
    """

    def __init__(self, config: ModelConfig, parts: Sequence[ModelShard], max_adapters: int, max_rank: int,
                 dtype: Any) -> None:
        for name, value, least in (("max_adapters", max_adapters, 0), ("max_adapter_rank", max_rank, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be an integer of at least {least}, not {value!r}")
        self._config, self._parts, self._max_rank = config, tuple(parts), max_rank
        self._slots: dict[str, int] = {}
        self._free = list(range(max_adapters, NO_ADAPTER, -1))
        self._loads, self._identities = 0, {}
        self._users = dict.fromkeys(self._free, 0)
        self._values: tuple[Adapters | None, ...] = (None,) * len(self._parts)
        if max_adapters:
            count, sizes = max_adapters + 1, target_sizes(config)
            self._host = [{f"{target}.{factor}": np.zeros((count, max_rank, sizes[target][0]) if factor == "a" else
                                                          (count, sizes[target][1], max_rank), jnp.dtype(dtype))
                           for target in TARGETS for factor in "ab"} for _ in range(config.num_layers)]
            self._scale = np.zeros(count, np.float32)
            self._put()

    @property
    def values(self) -> tuple[Adapters | None, ...]:
        """The arrays for the next step, of each part; None for an engine without adapters."""
        return self._values

    @property
    def identity_of_shapes(self) -> tuple[int, int]:
        """What programs depend on."""
        return len(self._users), self._max_rank

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
        with planned():  # reading compiles the conversion of its shapes
            lora, adapter = load_adapter(folder, self._config)
        if lora.rank > self._max_rank:
            raise UserError(f"the adapter in {folder} has rank {lora.rank}, this engine takes {self._max_rank}: raise "
                            "max_adapter_rank")
        self._slots[name] = slot = self._free.pop()
        self._loads += 1
        self._identities[slot] = self._loads
        self._fill(slot, adapter, lora.rank, lora.scale)

    def unload(self, name: str) -> None:
        """Forget an adapter. Refused while requests use it."""
        slot = self._slot(name)
        if self._users[slot]:
            raise UserError(f"{self._users[slot]} requests use the adapter {name!r}: wait for them, or abort them")
        del self._slots[name]
        self._free.append(slot)
        self._fill(slot, {}, 0, 0.0)

    def acquire(self, name: str | None) -> int:
        """The slot of an adapter (None: no adapter) for one more request, until `release`."""
        if name is None:
            return NO_ADAPTER
        slot = self._slot(name)
        self._users[slot] += 1
        return slot

    def identity(self, slot: int) -> int:
        """A number that no other adapter of this engine has or had: a name and a slot may be used again."""
        return self._identities.get(slot, 0)

    def release(self, slot: int) -> None:
        if slot != NO_ADAPTER:
            self._users[slot] -= 1

    def check(self, name: str | None) -> None:
        """UserError when ``name`` is neither None nor loaded."""
        if name is not None:
            self._slot(name)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise UserError(f"no adapter named {name!r} is loaded; loaded: {', '.join(self.names) or 'none'}")
        return self._slots[name]

    def _fill(self, slot: int, adapter: Mapping[str, jax.Array], rank: int, scale: float) -> None:
        for index, layer in enumerate(self._host):
            for name, values in layer.items():
                values[slot] = 0
                if name in adapter:
                    here = (slot, slice(rank)) if name.endswith(".a") else (slot, slice(None), slice(rank))
                    values[here] = np.asarray(adapter[name])[index]
        self._scale[slot] = scale
        self._put()

    def rearrange(self, parts: Sequence[ModelShard]) -> None:
        """The same adapters for other parts of the model."""
        self._parts, self._values = tuple(parts), (None,) * len(parts)
        if self._users:
            self._put()

    def shapes(self, part: ModelShard) -> Adapters | None:
        """What `values` is for a part, as shapes."""
        if not self._users:
            return None
        layers = tuple({name: self._held(part, name, jax.ShapeDtypeStruct(values.shape, values.dtype))
                        for name, values in layer.items()} for layer in self._host[part.start:part.end])
        return Adapters(layers, jax.ShapeDtypeStruct(self._scale.shape, np.float32, sharding=part.replicated))

    def _put(self) -> None:
        # Copies: on CPU a device array may share the host's memory, and steps under way must keep what they were given.
        self._values = tuple(Adapters(
            tuple({name: self._held(part, name, values.copy()) for name, values in layer.items()}
                  for layer in self._host[part.start:part.end]),
            put_global(self._scale.copy(), part.replicated)) for part in self._parts)

    def _held(self, part: ModelShard, name: str, values: Any) -> Any:
        """One factor of all slots, ``[S, r, I]`` or ``[S, O, r]``, or its shape, as a part holds it."""
        target, _, factor = name.rpartition(".")
        own = split_axes(self._config, target)[factor == "b"]
        names, sizes = zip(*own, strict=True)
        axes = ("slot", "rank", *names) if factor == "a" else ("slot", *names, "rank")
        before, after = values.shape[:2 if factor == "a" else 1], values.shape[3 if factor == "a" else 2:]
        # The flattened axis is divided as the first of those in it.
        flat = ("slot", "rank", names[0]) if factor == "a" else ("slot", names[0], "rank")
        if isinstance(values, jax.ShapeDtypeStruct):
            size = prod(expanded_shape(sizes, names, part.layout))
            return part.moved(jax.ShapeDtypeStruct((*before, size, *after), values.dtype), flat)
        held = expand(values.reshape(*before, *sizes, *after), axes, part.layout)
        return part.moved(held.reshape(*before, -1, *after), flat)
