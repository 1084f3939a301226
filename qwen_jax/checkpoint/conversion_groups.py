"""A Hugging Face model as pieces of an Orbax checkpoint, each of which is converted without the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.hf_layout import Entry, assemble, layout
from qwen_jax.checkpoint.precision_file import read_calibrated
from qwen_jax.checkpoint.safetensors_io import SafetensorsFolder, check_finite
from qwen_jax.checkpoint.source import Source
from qwen_jax.checkpoint.tensors import SCALE, as_dtype, open_tensors, sha256, split_stored
from qwen_jax.quantization import FP8Tensor, Precision, default_precision, quantize_host


class Pieces:
    """What to convert, group by group. Opening reads headers only; UserError for a folder that cannot be converted.

    Attributes:
      groups: canonical paths of each group, in the order in which they lie on disk.
      sizes: canonical path -> bytes as stored, before any rounding to 8 bits.
    """

    def __init__(self, source: Source, dtype: Any = None, fp8: bool = False) -> None:
        """Arguments as of `convert`."""
        config = source.config
        self._target = None if dtype is None else as_dtype(dtype)
        self._tensors = open_tensors(source)
        self._table = _by_position(layout(config), self._tensors)
        found = read_calibrated(source.path, config) if fp8 else None
        # Tables are rounded when they are loaded: other readers of a checkpoint do not expect them in 8 bits.
        self._precision = Precision(found.precision.weights) if found else default_precision(config, fp8, None)
        self.sizes = {path: entry.size * (self._target or self._tensors.dtype(entry.parts[0].name)).itemsize
                      for path, entry in self._table.items()}
        self.groups = list(orbax_store.groups(self.sizes))

    def size(self, group: list[str]) -> int:
        """Bytes."""
        return sum(self.sizes[path] for path in group)

    def source_dtype(self, name: str) -> np.dtype:
        """The element type of a Hugging Face tensor."""
        return self._tensors.dtype(name)

    def convert(self, group: list[str]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """A group's arrays by their name in the checkpoint, and what the manifest says of its tensors.

        Raises UserError for damaged tensors and for values that do not fit the wanted type.
        """
        arrays, entries = {}, {}
        for path in group:
            kept = self._stored(path)
            for name, tensor in split_stored(self._table[path], kept):
                entries[name] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": sha256(tensor)}
            if isinstance(kept, FP8Tensor):
                arrays[path], arrays[path + SCALE] = kept.values, kept.scale
            else:
                arrays[path] = kept
        return arrays, entries

    def _stored(self, path: str) -> np.ndarray | FP8Tensor:
        array, inputs = assemble(self._table[path], self._read), self._precision.inputs(path)
        return array if inputs is None else FP8Tensor(*quantize_host(array, inputs))

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors.read(name)
        if self._target is not None and tensor.dtype != self._target:
            tensor = tensor.astype(self._target)
            check_finite(name, tensor)
        return tensor


def _by_position(table: Mapping[str, Entry], tensors: SafetensorsFolder) -> dict[str, Entry]:
    """The table in the order its tensors lie on disk: shard by shard."""
    return dict(sorted(table.items(), key=lambda item: min(tensors.position(part.name) for part in item[1].parts)))
