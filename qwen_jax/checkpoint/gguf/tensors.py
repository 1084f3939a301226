"""The tensors of a GGUF model, read under Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.checkpoint.safetensors_io import DTYPES, check_finite, read_into

TABLE = "gguf_tensors.json"
_CHUNK = 1 << 21  # numbers that are dequantised at a time by each thread
_THREADS = 4


class _Location(NamedTuple):
    """Place of a tensor: file, ggml's name of its type, shape, first byte, and length in bytes."""

    file: str
    kind: str
    shape: list[int]
    offset: int
    nbytes: int


class GGUFTensors:
    """The tensors of a GGUF model that `unpack` has described in a folder.

    Args:
      folder: what `unpack` returned.
      dtype: element type of quantised matrices when they are read without another.
    """

    def __init__(self, folder: Path, dtype: np.dtype = DTYPES["BF16"]) -> None:
        self._folder, self._dtype = folder, dtype
        table: Mapping[str, Any] = json.loads((folder / TABLE).read_text())
        self._tensors = {name: _Location(**location) for name, location in table.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name."""
        return {name: tuple(location.shape) for name, location in self._tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """Return the element type of what `read` returns."""
        return DTYPES.get(self._tensors[name].kind, self._dtype)

    def position(self, name: str) -> tuple[str, int]:
        """Return a tensor's file and byte offset in it; reading tensors sorted by these is sequential."""
        return self._tensors[name].file, self._tensors[name].offset

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        """Read a tensor into memory, in element type ``dtype``; quantised ones are dequantised in float32 first.

        Raises UserError when the file ends early, and for NaN and Inf.
        """
        found = self._tensors[name]
        data = np.empty(found.nbytes, np.uint8)
        read_into(data, name, (self._folder / found.file).resolve(), found.offset)
        if found.kind in DTYPES:
            result = data.view(DTYPES[found.kind]).reshape(found.shape)
            with np.errstate(over="ignore"):  # what does not fit is found below
                result = result if dtype is None else result.astype(dtype, copy=False)
        else:
            result = _dequantized(data, found, dtype or self._dtype)
        check_finite(name, result)
        return result

    def identical(self, first: str, second: str) -> bool:
        """Return True when two tensors hold the same numbers."""
        return np.array_equal(self.read(first), self.read(second))


def _dequantized(data: np.ndarray, found: _Location, dtype: np.dtype) -> np.ndarray:
    """Return a tensor of one of ggml's block types in element type ``dtype``, several rows at a time."""
    from gguf import GGMLQuantizationType, dequantize

    kind, width = GGMLQuantizationType[found.kind], found.shape[-1]
    rows = data.reshape(prod(found.shape[:-1]), -1)
    result = np.empty((len(rows), width), dtype)
    step = max(1, _CHUNK // width)

    def fill(start: int) -> None:
        with np.errstate(all="ignore"):  # a damaged scale is found where values are checked
            result[start:start + step] = dequantize(rows[start:start + step], kind)

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(fill, range(0, len(rows), step)))
    return result.reshape(found.shape)
