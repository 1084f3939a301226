"""Conversion of a Hugging Face model to Orbax's arrays in groups of parameters, each without the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.hf_layout import Entry, assemble, layout
from qwen_jax.checkpoint.precision_file import read_calibrated
from qwen_jax.checkpoint.safetensors_io import SafetensorsFolder, check_finite
from qwen_jax.checkpoint.source import Source
from qwen_jax.checkpoint.tensors import SCALE, open_tensors, sha256, split_stored
from qwen_jax.quantization import Precision, QuantizedTensor, default_precision, quantize_host


class GroupConverter:
    """A converter of a Hugging Face model's parameters, a group at a time, in this process or, pickled, in another.

    Making one reads headers only. Raises UserError for a folder that cannot be converted.

    Args:
      dtype: element type to store, or None to keep the stored one.
      fp8: store as e4m3 the matrices that `convert` says.

    Attributes:
      groups: paths of the parameters of each group, in the order in which they lie on disk.
      sizes: parameter path -> bytes in the result, before any rounding to 8 bits.
    """

    def __init__(self, source: Source, dtype: np.dtype | None = None, fp8: bool = False) -> None:
        config = source.config
        self._dtype = dtype
        self._tensors = open_tensors(source)
        self._table = _by_position(layout(config), self._tensors)
        calibrated = read_calibrated(source.path, config) if fp8 else None
        # Tables are rounded when they are loaded: other readers of a checkpoint do not expect them in 8 bits.
        self._precision = (Precision(calibrated.precision.weights) if calibrated else
                           default_precision(config, fp8, None))
        self.sizes = {path: entry.size * (dtype or self.source_dtype(entry.tensors[0].name)).itemsize
                      for path, entry in self._table.items()}
        self.groups = list(orbax_store.groups(self.sizes))

    def group_bytes(self, group: list[str]) -> int:
        return sum(self.sizes[path] for path in group)

    def source_dtype(self, name: str) -> np.dtype:
        """Return the element type in which a tensor of the Hugging Face folder is read."""
        return self._tensors.dtype(name)

    def convert(self, group: list[str]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Convert a group of parameters: return its arrays by name on disk, and the manifest's entries of its tensors.

        Raises UserError for damaged tensors and for values that do not fit the wanted type.
        """
        arrays, entries = {}, {}
        for path in group:
            value = self._converted(path)
            for name, tensor in split_stored(self._table[path], value):
                entries[name] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": sha256(tensor)}
            if isinstance(value, QuantizedTensor):
                arrays[path], arrays[path + SCALE] = value.values, value.scale
            else:
                arrays[path] = value
        return arrays, entries

    def _converted(self, path: str) -> np.ndarray | QuantizedTensor:
        array, inputs = assemble(self._table[path], self._read), self._precision.inputs(path)
        return array if inputs is None else QuantizedTensor(*quantize_host(array, inputs))

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors.read(name, self._dtype)
        if self._dtype is not None and tensor.dtype != self._dtype:
            tensor = tensor.astype(self._dtype)
            check_finite(name, tensor)
        return tensor


def _by_position(table: Mapping[str, Entry], tensors: SafetensorsFolder) -> dict[str, Entry]:
    """Return the table of parameters sorted by where their tensors lie on disk: shard by shard."""
    return dict(sorted(table.items(), key=lambda item: min(tensors.position(part.name) for part in item[1].tensors)))
