"""The weights of a running engine, in versions: every request runs with one of them from beginning to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qwen_jax.engine.compiled.compile_counter import planned
from qwen_jax.engine.config import engine_config
from qwen_jax.engine.weights.weight_sharding import ShardedLeaves, WeightSharding
from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2, params_of

if TYPE_CHECKING:
    from qwen_jax.checkpoint import Source

class VersionedWeights:
    """The version that new requests run with, the one before it, and those that older requests still run with.

    A version has for each part of the model a tuple of arrays in the order of ``spread.treedefs[part]``: the
    parameters, as ``precision`` holds them, and the scales of 8-bit pages. It is a value, so putting another one in its
    place compiles nothing.

    Args:
      source: version 0: a module, or a checkpoint, of which every device reads its part. A module's arrays (or the
        shapes it has instead) are used as they are where a single device holds the whole model.
    """

    def __init__(self, source: Qwen2 | Source, sharding: WeightSharding) -> None:
        self.config, self.sharding = source.config, sharding
        self.current, self.previous = 0, None
        self._candidate: int | None = None
        self._count = 1
        if isinstance(source, Qwen2):
            placed = ((path, sharding.stored(path, value)) for path, value in params_of(source).items())
        else:
            placed = self._read(source)
        self._versions: dict[int, ShardedLeaves] = {0: sharding.leaves(sharding.all(placed))}

    def __getitem__(self, version: int) -> ShardedLeaves:
        return self._versions[version]

    @property
    def versions(self) -> list[int]:
        return sorted(self._versions)

    @property
    def nbytes(self) -> int:
        """Bytes of one version on the device that has the most of it; in all on a CPU, whose devices share memory."""
        found: Counter[jax.Device] = Counter()
        for leaves in self._versions[self.current]:
            for leaf in leaves:
                for shard in leaf.addressable_shards:
                    found[shard.device] += shard.data.nbytes
        return sum(found.values()) if engine_config.platform() == "cpu" else max(found.values())

    def load(self, source: Any) -> ShardedLeaves:
        """Another version's arrays, checked, on the devices; nothing changes here, and any thread may call this.

        Args:
          source: a folder, a hub id or ``bundled``, a ``Qwen2`` module, or parameters by canonical path.

        Raises UserError when the memory does not suffice, for another architecture, for missing, unexpected or
        misshapen parameters, for NaN or Inf, and for a converted checkpoint that differs from its checksums.
        """
        self._check_memory()
        if isinstance(source, str | Path):
            checked = self._checked(source)
            with planned():
                return self.sharding.leaves(self.sharding.all(self._read(checked)))
        params = params_of(source) if isinstance(source, Qwen2) else source
        if not isinstance(params, Mapping):
            raise UserError("weights come from a folder, a hub id, a Qwen2 module or parameters by name, not from "
                            f"{type(source).__name__}")
        with planned():
            return self.sharding.leaves(self.sharding.all(self._copied(params)))

    def add(self, leaves: ShardedLeaves) -> int:
        """A number for these arrays, which requests may then run with, until `make_current` or `forget`."""
        number, self._count = self._count, self._count + 1
        self._versions[number] = leaves
        self._candidate = number
        return number

    def make_current(self, version: int) -> None:
        if version != self.current:
            self.previous, self.current, self._candidate = self.current, version, None

    def other(self) -> int:
        """The version before the current one; after going back to it, the one that was left."""
        if self.previous is None:
            raise UserError("there is no other version of the weights to go back to")
        return self.previous

    def forget(self, version: int) -> None:
        """Drops a version that is not current and that nothing runs with."""
        del self._versions[version]
        if version == self.previous:
            self.previous = None
        if version == self._candidate:
            self._candidate = None

    def drop_unused(self, used: Iterable[int]) -> None:
        """Keeps the current version, the previous one, one that is being tried, and those in use."""
        for version in self._versions.keys() - {self.current, self.previous, self._candidate, *used}:
            del self._versions[version]

    def replace(self, source: str | Path) -> int:
        """Puts a checkpoint's parameters in the place of the only version, one after another; returns its number.

        Raises UserError, and nothing has changed, for what `load` refuses. What goes wrong after that is a
        RuntimeError: the weights are then a mixture.
        """
        checked = self._checked(source)
        self.drop_unused(())
        if self.previous is not None:
            self.forget(self.previous)
        params = self.sharding.by_name(self._versions.pop(self.current))
        try:
            with planned():
                for path, value in self._read(checked):
                    self.sharding.put(params, path, value)  # the old one is freed before the next is read
                leaves = self.sharding.leaves(params)
        except Exception as error:
            raise RuntimeError(f"the weights were being replaced by {source} in place: {error}") from error
        self.current, self._candidate = self.add(leaves), None
        return self.current

    def rearrange(self, sharding: WeightSharding) -> None:
        """All versions for other parts of the model; compiles nothing."""
        for number in self.versions:
            self._versions[number] = sharding.rearranged(self.sharding, self._versions.pop(number))
        self.sharding = sharding

    def _check_memory(self) -> None:
        free = engine_config.free_memory()
        if free < self.nbytes:
            raise UserError(f"a second copy of the weights takes {self.nbytes:,} bytes and {free:,} are free: give the "
                            "KV cache less (kv_cache_bytes), or use in_place=True, which pauses the engine")

    def _checked(self, ref: str | Path) -> Source:
        from qwen_jax.checkpoint import resolve, verify

        source = resolve(ref)
        differing = engine_config.differences(self.config, source.config)
        if differing:
            raise UserError(f"{ref} is another architecture: it differs in {', '.join(differing)}")
        verify(source)
        return source

    def _copied(self, params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Somebody else's arrays."""
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
            yield path, self.sharding.stored(path, array)

    def _read(self, source: Source) -> Iterator[tuple[str, Any]]:
        from qwen_jax.checkpoint import iter_params

        sharding = self.sharding
        return iter_params(source, self.config, sharding.dtype, sharding.shardings, sharding.precision,
                           sharding.expansions)
