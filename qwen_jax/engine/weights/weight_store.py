"""The weights of a running engine, in versions: every request runs with one of them from beginning to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiled.compile_counter import planned
from qwen_jax.engine.config import memory
from qwen_jax.engine.config.resolve import differences
from qwen_jax.engine.weights.weight_sharding import ShardedLeaves, WeightSharding
from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2, params_of

if TYPE_CHECKING:
    from qwen_jax.checkpoint import Source


class VersionedWeights:
    """Versions of the weights: the current one, the previous one, and those that older requests still run with.

    A version has for each shard of the model a tuple of arrays in the order of ``sharding.treedefs[shard]``: the
    parameters, 8-bit or not, and the scales of 8-bit pages. Programs take it as an argument, so another version
    compiles nothing.

    There is none before `read_first`.

    Attributes:
      config: config of the model.
      sharding: how every version is divided over the devices.
      current: number of the version that new requests run with.
      previous: number of the version that was current before it, or None.
      leaves_of: arrays of every loaded version, by its number.
    """

    def __init__(self, config: ModelConfig, sharding: WeightSharding) -> None:
        self.config, self.sharding = config, sharding
        self.current, self.previous = 0, None
        self._candidate: int | None = None
        self._count = 1
        self.leaves_of: dict[int, ShardedLeaves] = {}

    def read_first(self, source: Qwen2 | Source) -> None:
        """Load version 0: from a module, or from a checkpoint, of which every device reads its shard.

        A module's arrays (or the shapes that it has instead) are used as they are where a single device holds the whole
        model.
        """
        sharding = self.sharding
        if isinstance(source, Qwen2):
            placed = ((path, sharding.place(path, value)) for path, value in params_of(source).items())
        else:
            placed = self._read(source)
        self.leaves_of[0] = sharding.leaves(sharding.by_shard(placed))

    @property
    def versions(self) -> list[int]:
        return sorted(self.leaves_of)

    @property
    def nbytes(self) -> int:
        """Bytes of one version on the device that holds the most of it, or on all CPU devices, which share memory."""
        per_device: Counter[jax.Device] = Counter()
        for leaves in self.leaves_of[self.current]:
            for leaf in leaves:
                for shard in leaf.addressable_shards:
                    per_device[shard.device] += shard.data.nbytes
        return sum(per_device.values()) if memory.platform() == "cpu" else max(per_device.values())

    def load(self, source: Any) -> ShardedLeaves:
        """Return the checked arrays of another version, on the devices. Changes nothing, and any thread may call it.

        Args:
          source: a folder, a hub id or ``bundled``, a ``Qwen2`` module, or parameters by canonical path.

        Raises UserError when the memory does not suffice, for another architecture, for missing, unexpected or
        misshapen parameters, for NaN or Inf, and for a converted checkpoint that differs from its checksums.
        """
        self._check_memory()
        if isinstance(source, str | Path):
            checked = self._checked(source)
            with planned():
                return self.sharding.leaves(self.sharding.by_shard(self._read(checked)))
        params = params_of(source) if isinstance(source, Qwen2) else source
        if not isinstance(params, Mapping):
            raise UserError("weights come from a folder, a hub id, a Qwen2 module or parameters by name, not from "
                            f"{type(source).__name__}")
        with planned():
            return self.sharding.leaves(self.sharding.by_shard(self._copied(params)))

    def add(self, leaves: ShardedLeaves) -> int:
        """Store a version that is to be tried, until `make_current` or `forget`, and return its number."""
        number, self._count = self._count, self._count + 1
        self.leaves_of[number] = leaves
        self._candidate = number
        return number

    def make_current(self, version: int) -> None:
        """Let new requests run with a version; the version that was current becomes the previous one."""
        if version not in self.leaves_of:
            raise ValueError(f"version {version} of the weights is not loaded")
        if version == self._candidate:
            self._candidate = None
        if version != self.current:
            self.previous, self.current = self.current, version

    def other(self) -> int:
        """Return the number of the previous version, to which a rollback goes. UserError when there is none."""
        if self.previous is None:
            raise UserError("there is no other version of the weights to go back to")
        if self._candidate is not None:
            raise UserError("new weights are being tried on golden prompts: roll back when that has ended")
        return self.previous

    def forget(self, version: int) -> None:
        """Drop a version that is not current and that no request runs with."""
        del self.leaves_of[version]
        if version == self.previous:
            self.previous = None
        if version == self._candidate:
            self._candidate = None

    def drop_unused(self, used: Iterable[int]) -> None:
        """Drop every version but the current one, the previous one, the one that is being tried, and those in use."""
        for version in self.leaves_of.keys() - {self.current, self.previous, self._candidate, *used}:
            del self.leaves_of[version]

    def replace(self, source: str | Path) -> int:
        """Overwrite the weights by a checkpoint, one parameter after another, and return the new version's number.

        No other version stays. Raises UserError, and changes nothing, where `load` does. A failure after that is a
        RuntimeError: the weights are then a mixture of both.
        """
        checked = self._checked(source)
        self.drop_unused(())
        if self.previous is not None:
            self.forget(self.previous)
        params = self.sharding.by_name(self.leaves_of.pop(self.current))
        try:
            with planned():
                for path, value in self._read(checked):
                    self.sharding.insert(params, path, value)  # the old array is freed before the next is read
                leaves = self.sharding.leaves(params)
        except Exception as error:
            raise RuntimeError(f"the weights were being replaced by {source} in place: {error}") from error
        self.current, self._candidate = self.add(leaves), None
        return self.current

    def rearrange(self, sharding: WeightSharding) -> None:
        """Move all versions to the devices of other shards of the model. Compiles nothing."""
        for number in self.versions:
            self.leaves_of[number] = sharding.resharded(self.leaves_of.pop(number), before=self.sharding)
        self.sharding = sharding

    def _check_memory(self) -> None:
        free = memory.free_memory()
        if free < self.nbytes:
            raise UserError(f"a second copy of the weights takes {self.nbytes:,} bytes and {free:,} are free: give the "
                            "KV cache less (kv_cache_bytes), or use in_place=True, which pauses the engine")

    def _checked(self, ref: str | Path) -> Source:
        """Find a checkpoint of this architecture and compare it with its checksums; UserError when it does not fit."""
        from qwen_jax.checkpoint import resolve, verify

        source = resolve(ref)
        differing = differences(self.config, source.config)
        if differing:
            raise UserError(f"{ref} is another architecture: it differs in {', '.join(differing)}")
        verify(source)
        return source

    def _copied(self, params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield (path, copy on the devices) for each of the caller's arrays. UserError when one does not fit."""
        from qwen_jax.checkpoint import check_finite

        specs, dtype = self.sharding.specs, self.sharding.dtype
        wrong = sorted(params.keys() ^ specs.keys())
        if wrong:
            raise UserError(f"parameters are missing or unexpected: {', '.join(wrong[:8])}")
        wrong = [f"{path} {tuple(np.shape(value))} for {specs[path].shape}" for path, value in params.items()
                 if np.shape(value) != specs[path].shape]
        if wrong:
            raise UserError(f"parameters of another shape: {'; '.join(wrong[:8])}")
        for path, value in params.items():
            array = np.asarray(value)
            array = array.astype(dtype) if array.dtype != dtype else array.copy()
            check_finite(path, array)
            yield path, self.sharding.place(path, array)

    def _read(self, source: Source) -> Iterator[tuple[str, Any]]:
        from qwen_jax.checkpoint import iter_params

        return iter_params(source, self.config, self.sharding.placements)
