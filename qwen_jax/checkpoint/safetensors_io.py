"""Hugging Face weight folders, read and written a tensor at a time.

Tensors are read with plain reads instead of a memory map: mapped pages count as the process's resident memory, so a
mapped 5 GB shard would break the bound on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qwen_jax.checkpoint.quantized import Matrix, Scheme, Stored, scheme_of
from qwen_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_STORED = {**DTYPES, "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32),
           "I64": np.dtype(np.int64)}
_CHUNK = 4 << 20  # elements or bytes handled at a time where a whole-tensor temporary is not wanted


class _Location(NamedTuple):
    """Place of a tensor in a file: its element type and shape, its first byte, and its length in bytes."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFolder:
    """The tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` lists.

    Quantised matrices are listed and read under the names that they have unquantised, as the numbers that they stand
    for; the tensors that they consist of are not listed.

    Args:
      scheme: how matrices are quantised, if they are; by default FP8.
      dtype: element type of quantised matrices when they are read without another.

    Opening reads headers only. Raises UserError for a folder without safetensors, a missing, truncated or corrupt
    shard, a tensor stored twice, quantised matrices that the scheme refuses, and element types other than bfloat16,
    float16 and float32 where nothing is quantised.
    """

    def __init__(self, folder: Path, scheme: Scheme | None = None, dtype: np.dtype = DTYPES["BF16"]) -> None:
        self.folder, self._scheme, self._dtype = folder, scheme or scheme_of({}), dtype
        self._tensors: dict[str, _Location] = {}
        codes: dict[str, str] = {}
        for file, expected in _shards(folder).items():
            for name, (code, location) in _read_header(file).items():
                if name in self._tensors:
                    raise UserError(f"{name} is stored in both {self._tensors[name].file.name} and {file.name}")
                self._tensors[name], codes[name] = location, code
            absent = sorted(set(expected) - set(self._tensors))
            if absent:
                raise UserError(f"{file} lacks {absent[0]}, which {INDEX} says it holds: download the file again")
        self._matrices: dict[str, Matrix] = self._scheme.matrices(
            {name: Stored(code, self._tensors[name].shape) for name, code in codes.items()})
        self._parts = {part: self._tensors.pop(part) for matrix in self._matrices.values()
                       for part in matrix.parts.values()}
        if self._matrices:
            for name in [name for name in self._tensors if name.endswith(self._scheme.passed_over)]:
                del self._tensors[name]
        wrong = [f"{name} ({codes[name]})" for name in self._tensors if codes[name] not in DTYPES]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise UserError(f"wrong element type in {folder}: {', '.join(wrong[:4])}{more}; only bfloat16, float16, "
                            "float32 and the quantised weights that config.json describes are read")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of the folder's tensors by name."""
        return {name: location.shape for name, location in self._tensors.items()} | {
            name: matrix.shape for name, matrix in self._matrices.items()}

    def quantized(self, name: str) -> bool:
        """Return whether a tensor is a quantised matrix."""
        return name in self._matrices

    def discard(self, name: str) -> None:
        """List a tensor no longer."""
        del self._tensors[name]

    def dtype(self, name: str) -> np.dtype:
        """Return the element type of what `read` returns."""
        return self._dtype if name in self._matrices else self._tensors[name].dtype

    def position(self, name: str) -> tuple[str, int]:
        """Return a tensor's shard file and byte offset in it; reading tensors sorted by these is sequential."""
        first = next(iter(self._matrices[name].parts.values())) if name in self._matrices else name
        location = self._parts.get(first) or self._tensors[first]
        return location.file.name, location.offset

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        """Read a tensor into memory, a quantised matrix in element type ``dtype``.

        Raises UserError when the file ends early, for NaN and Inf, and for damaged parts of a quantised matrix.
        """
        if matrix := self._matrices.get(name):
            parts = {role: _read(part, self._parts[part]) for role, part in matrix.parts.items()}
            tensor = self._scheme.dequantize(name, parts, dtype or self._dtype)
        else:
            tensor = _read(name, self._tensors[name])
        check_finite(name, tensor)
        return tensor

    def identical(self, first: str, second: str) -> bool:
        """Return True when two tensors hold the same numbers. Of unquantised ones neither is held in memory whole."""
        if first in self._matrices or second in self._matrices:
            return np.array_equal(self.read(first), self.read(second))
        a, b = self._tensors[first], self._tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with open(a.file, "rb") as left, open(b.file, "rb") as right:
            left.seek(a.offset)
            right.seek(b.offset)
            for start in range(0, a.nbytes, _CHUNK):
                count = min(_CHUNK, a.nbytes - start)
                if left.read(count) != right.read(count):
                    return False
        return True


class SafetensorsWriter:
    """Writer of ``model.safetensors``, or of shards and their index, from tensors that arrive one at a time.

    Args:
      folder: an existing folder to write into.
      specs: name -> (dtype, shape) of every tensor, in the order they will be written.
      max_shard_bytes: size of a shard; a tensor that would exceed it begins the next shard.
    """

    def __init__(self, folder: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
                 max_shard_bytes: int) -> None:
        self._folder = folder
        self._specs = dict(specs)
        self._sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (dtype, shape) in specs.items()}
        shards, filled = [[]], 0
        for name, size in self._sizes.items():
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        names = [SINGLE] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._shards = dict(zip(names, shards, strict=True))
        self._file_of = {name: file for file, members in self._shards.items() for name in members}
        self._remaining = iter(self._specs)
        self._open_name, self._open = None, None

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Append a tensor to the current shard, or begin the next one; names must come in the order of ``specs``."""
        expected = next(self._remaining, None)
        if name != expected or (tensor.dtype, tensor.shape) != self._specs[name]:
            raise ValueError(f"expected {expected} {self._specs.get(expected)}, got {name} {tensor.dtype} "
                             f"{tensor.shape}")
        if self._file_of[name] != self._open_name:
            self._start(self._file_of[name])
        self._open.write(memoryview(as_bytes(tensor)))

    def close(self) -> None:
        """Close the last shard, and write the index when there are several shards."""
        if self._open:
            self._open.close()
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": self._file_of}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _start(self, file: str) -> None:
        """Begin a shard file and write its header."""
        if self._open:
            self._open.close()
        header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without this mark
        for name in self._shards[file]:
            dtype, shape = self._specs[name]
            end = offset + self._sizes[name]
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants its data aligned to 8 bytes
        self._open_name, self._open = file, open(self._folder / file, "wb")  # buffered: raw writes stop at 2 GB
        self._open.write(len(text).to_bytes(8, "little") + text)


def as_bytes(tensor: np.ndarray) -> np.ndarray:
    """Return a uint8 view of a C-contiguous array (bfloat16 arrays have no buffer interface of their own)."""
    return tensor.reshape(-1).view(np.uint8)


def check_finite(name: str, tensor: np.ndarray) -> None:
    """Raise UserError with ``name`` when the tensor holds NaN or Inf. Temporary arrays stay at a few MB."""
    flat = tensor.reshape(-1)
    if tensor.dtype.itemsize == 2:  # all-ones exponent; ml_dtypes' isfinite is several times slower than integers
        limit = 0x7F80 if tensor.dtype == DTYPES["BF16"] else 0x7C00
        bits = flat.view(np.uint16)
        bad = any((bits[i:i + _CHUNK] & 0x7FFF).max() >= limit for i in range(0, bits.size, _CHUNK))
    else:
        bad = any(not np.isfinite(flat[i:i + _CHUNK]).all() for i in range(0, flat.size, _CHUNK))
    if bad:
        raise UserError(f"{name} holds NaN or Inf in {tensor.dtype}: the weights are damaged, or do not fit this type")


def read_into(tensor: np.ndarray, name: str, file: Path, offset: int) -> None:
    """Fill a C-contiguous array with a file's bytes from ``offset`` on; UserError when the file ends before that."""
    with open(file, "rb", buffering=0) as opened:
        opened.seek(offset)
        view, done = memoryview(as_bytes(tensor)), 0
        while done < tensor.nbytes:
            count = opened.readinto(view[done:])
            if not count:
                raise UserError(f"{file} is truncated inside {name}: download it again")
            done += count


def _read(name: str, location: _Location) -> np.ndarray:
    tensor = np.empty(location.shape, location.dtype)
    read_into(tensor, name, location.file, location.offset)
    return tensor


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Return the folder's weight files, each with the names of the tensors that the index lists in it (none for a
    single file)."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: []}
    if not index.is_file():
        if any(folder.glob("*.gguf")):
            raise UserError(f"{folder} holds no safetensors, and a GGUF file: name the GGUF file itself")
        if any(folder.glob("pytorch_model*.bin")):
            raise UserError(f"{folder} holds only pytorch_model.bin weights, which can run code when loaded: save them "
                            "as safetensors first (transformers: model.save_pretrained)")
        raise UserError(f"no {SINGLE} or {INDEX} in {folder}: give a folder that holds the model's weights")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise UserError(f"{index} names a shard outside its folder: {file}")
            shards.setdefault(folder / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{index} is not a valid index: download it again") from None
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise UserError(f"missing shard {', '.join(missing)} in {folder} (listed in {INDEX}): download it again")
    return shards


def _read_header(file: Path) -> dict[str, tuple[str, _Location]]:
    """Read a safetensors file's header: return each tensor's element type, as the format spells it, and place.

    Raises UserError for a damaged file.
    """
    try:
        with safe_open(file, framework="np"):  # checks the header against itself and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt ({error}): download it again") from None
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        dtype = _STORED.get(info["dtype"], np.dtype(np.uint8))
        location = _Location(file, dtype, shape=tuple(info["shape"]), offset=8 + length + start, nbytes=end - start)
        tensors[name] = info["dtype"], location
    return tensors
