"""The weights of a running engine, in versions: every request runs with one of them from beginning to end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from qwen_jax.engine import settings
from qwen_jax.engine.executables import planned
from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2, build, params_of
from qwen_jax.quantization import Precision, Ranges, scales_of

if TYPE_CHECKING:
    from qwen_jax.checkpoint import Source


class Weights:
    """The version that new requests run with, the one before it, and those that older requests still run with.

    A version is a tuple of arrays in the order of ``treedef``: the parameters, as ``precision`` holds them, and the
    scales of 8-bit pages; ``ranges`` that were measured hold for all versions. It is a value, so putting another one in
    its place compiles nothing.
    """

    def __init__(self, model: Qwen2, precision: Precision, ranges: tuple[Ranges, ...] | None = None) -> None:
        self.config, self.precision, self._ranges = model.config, precision, ranges
        params = {path: precision.store(path, value) for path, value in params_of(model).items()}
        model = build(self.config, params)
        self.graph, state = nnx.split(model)
        leaves, self.treedef = jax.tree.flatten((state, scales_of(params, precision, ranges)))
        self.current, self.previous = 0, None
        self._versions: dict[int, tuple[jax.Array, ...]] = {0: tuple(leaves)}
        self._specs = {path: (value.shape, value.dtype) for path, value in params.items()}
        self._shardings = {path: value.sharding for path, value in params.items()}
        self._dtype = model.dtype
        self._candidate: int | None = None
        self._count = 1

    def __getitem__(self, version: int) -> tuple[jax.Array, ...]:
        return self._versions[version]

    @property
    def versions(self) -> list[int]:
        return sorted(self._versions)

    @property
    def nbytes(self) -> int:
        """Bytes of one version."""
        return sum(leaf.nbytes for leaf in self._versions[self.current])

    def load(self, source: Any) -> tuple[jax.Array, ...]:
        """Another version's arrays, checked, on the devices; nothing changes here, and any thread may call this.

        Args:
          source: a folder, a hub id or ``bundled``, a ``Qwen2`` module, or parameters by canonical path.

        Raises UserError when the memory does not suffice, for another architecture, for missing, unexpected or
        misshapen parameters, for NaN or Inf, and for a converted checkpoint that differs from its checksums.
        """
        self._check_memory()
        if isinstance(source, str | Path):
            from qwen_jax.checkpoint import load_params

            checked = self._checked(source)
            with planned():
                return self._leaves(load_params(checked, checked.config, self._dtype, self._shardings, self.precision))
        params = params_of(source) if isinstance(source, Qwen2) else source
        if not isinstance(params, Mapping):
            raise UserError("weights come from a folder, a hub id, a Qwen2 module or parameters by name, not from "
                            f"{type(source).__name__}")
        with planned():
            return self._leaves(self._placed(params))

    def add(self, leaves: tuple[jax.Array, ...]) -> int:
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
        from qwen_jax.checkpoint import iter_params

        checked = self._checked(source)
        self.drop_unused(())
        if self.previous is not None:
            self.forget(self.previous)
        params = self._by_path(self._versions.pop(self.current))
        try:
            with planned():
                for path, value in iter_params(checked, checked.config, self._dtype, self._shardings, self.precision):
                    params[path] = value  # the old one is freed before the next is read
                leaves = self._leaves(params)
        except Exception as error:
            raise RuntimeError(f"the weights were being replaced by {source} in place: {error}") from error
        self.current, self._candidate = self.add(leaves), None
        return self.current

    def _check_memory(self) -> None:
        free = settings.free_memory()
        if free < self.nbytes:
            raise UserError(f"a second copy of the weights takes {self.nbytes:,} bytes and {free:,} are free: give the "
                            "KV cache less (kv_cache_bytes), or use in_place=True, which pauses the engine")

    def _checked(self, ref: str | Path) -> Source:
        from qwen_jax.checkpoint import resolve, verify

        source = resolve(ref)
        differing = settings.differences(self.config, source.config)
        if differing:
            raise UserError(f"{ref} is another architecture: it differs in {', '.join(differing)}")
        verify(source)
        return source

    def _placed(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
        from qwen_jax.checkpoint import check_finite

        placed = {}
        for path in params.keys() & self._shardings.keys():  # others are found by _leaves
            array = np.asarray(params[path])
            array = array.astype(self._dtype) if array.dtype != self._dtype else array.copy()
            check_finite(path, array)
            placed[path] = self.precision.store(path, jax.device_put(array, self._shardings[path]))
        return placed | {path: params[path] for path in params.keys() - self._shardings.keys()}

    def _leaves(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        own = self._specs
        wrong = sorted(params.keys() ^ own.keys())
        if wrong:
            raise UserError(f"parameters are missing or unexpected: {', '.join(wrong[:8])}")
        wrong = [f"{path} {tuple(params[path].shape)} {params[path].dtype} for {shape} {dtype}"
                 for path, (shape, dtype) in own.items() if (params[path].shape, params[path].dtype) != (shape, dtype)]
        if wrong:
            raise UserError(f"parameters of another shape or type: {'; '.join(wrong[:8])}")
        _, state = nnx.split(build(self.config, params))
        return tuple(jax.tree.leaves((state, scales_of(params, self.precision, self._ranges))))

    def _by_path(self, leaves: tuple[jax.Array, ...]) -> dict[str, Any]:
        state, _ = jax.tree.unflatten(self.treedef, leaves)
        return params_of(nnx.merge(self.graph, state))
