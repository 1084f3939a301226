"""Tensors as checkpoints store them: element types, SHA-256 hashes, and the scales of FP8 tensors."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_jax.checkpoint.gguf.tensors import GGUFTensors
from qwen_jax.checkpoint.hf_layout import EMBEDDING, HEAD, Entry, check_shapes, hf_shapes, layout, split
from qwen_jax.checkpoint.quantized import scheme_of
from qwen_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFolder, as_bytes
from qwen_jax.checkpoint.source import Source, read_json
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization import E4M3, QuantizedTensor

SCALE = ".scale"  # ending of the name under which an FP8 parameter's scales lie beside its values


def split_stored(entry: Entry, stored: np.ndarray | QuantizedTensor
                 ) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """Split a stored parameter into its Hugging Face tensors: yield the name and value of each.

    An FP8 tensor is yielded as its rows and their scales.
    """
    if not isinstance(stored, QuantizedTensor):
        yield from split(entry, stored)
        return
    for tensor, (name, values) in zip(entry.tensors, split(entry, stored.values), strict=True):
        yield name, QuantizedTensor(values, np.ascontiguousarray(stored.scale[tensor.index]).reshape(-1))


def open_tensors(source: Source) -> SafetensorsFolder | GGUFTensors:
    """Open the weights of a Hugging Face folder or GGUF file; UserError when names or shapes are not those of its
    config."""
    config = source.config
    dtype = DTYPES["F16"] if config.dtype == "float16" else DTYPES["BF16"]
    if source.kind == "gguf":
        tensors = GGUFTensors(source.path, dtype)
    else:
        tensors = SafetensorsFolder(source.path, scheme_of(read_json(source.path / "config.json"), source.path), dtype)
        _discard_empty_biases(tensors, config)
    check_shapes(config, tensors.shapes(), str(source.path))
    if config.tie_word_embeddings and HEAD in tensors.shapes() and not tensors.identical(HEAD, EMBEDDING):
        raise UserError(f"config.json in {source.path} ties the head to the embedding, but the two tensors differ: set "
                        "tie_word_embeddings to false to use the stored head")
    return tensors


def _discard_empty_biases(tensors: SafetensorsFolder, config: ModelConfig) -> None:
    """Leave out biases of zeros that GPTQ's tools give to every quantised matrix; Qwen2.5 has fewer of them."""
    expected = hf_shapes(config)
    for name in tensors.shapes():
        weight = name.removesuffix(".bias") + ".weight"
        if name.endswith(".bias") and name not in expected and weight in expected and tensors.quantized(weight):
            if np.any(tensors.read(name)):
                raise UserError(f"{name} in {tensors.folder} is not zero, and Qwen2.5 has no such bias")
            tensors.discard(name)


def stored_dtypes(config: ModelConfig, manifest: Mapping[str, Any]) -> dict[str, np.dtype]:
    """Return the element type of each parameter of a converted checkpoint, by the parameter's path."""
    names = {path: manifest["tensors"][entry.tensors[0].name]["dtype"] for path, entry in layout(config).items()}
    return {path: E4M3 if name == str(E4M3) else as_dtype(name) for path, name in names.items()}


def as_dtype(dtype: Any) -> np.dtype:
    """Return the NumPy element type that ``dtype`` names; UserError for one that weights are not stored in."""
    try:
        converted = jnp.dtype(dtype)
    except TypeError:
        converted = None
    if converted not in DTYPES.values():
        raise UserError(f"dtype {str(dtype)!r} is not supported for weights: use bfloat16, float16 or float32")
    return converted


def sha256(tensor: np.ndarray | QuantizedTensor) -> str:
    """Return the hexadecimal SHA-256 of a C-contiguous array's bytes; of FP8, the values' and then the scales'."""
    digest = hashlib.sha256()
    for array in (tensor.values, tensor.scale) if isinstance(tensor, QuantizedTensor) else (tensor,):
        digest.update(as_bytes(array))
    return digest.hexdigest()


def progress(total_bytes: int, label: str) -> tqdm:
    """Return a progress bar in bytes on stderr, which appears after a second."""
    return tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, delay=1, mininterval=0.5, file=sys.stderr)
