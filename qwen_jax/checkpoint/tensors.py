"""Tensors as checkpoints store them: element types, hashes, and what belongs together."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_jax.checkpoint.hf_layout import EMBEDDING, HEAD, Entry, check_shapes, layout, split
from qwen_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFolder, as_bytes
from qwen_jax.checkpoint.source import Source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization import E4M3, FP8Tensor

SCALE = ".scale"  # of an FP8 parameter, beside its values


def split_stored(entry: Entry, stored: np.ndarray | FP8Tensor) -> Iterator[tuple[str, np.ndarray | FP8Tensor]]:
    """Each Hugging Face tensor of a parameter: its name, and its value or, of FP8, its rows and their scales."""
    if not isinstance(stored, FP8Tensor):
        yield from split(entry, stored)
        return
    for part, (name, values) in zip(entry.parts, split(entry, stored.values), strict=True):
        yield name, FP8Tensor(values, np.ascontiguousarray(stored.scale[part.index]).reshape(-1))


def open_tensors(source: Source) -> SafetensorsFolder:
    """A Hugging Face folder's weights, with names and shapes checked against its config."""
    tensors, config = SafetensorsFolder(source.path), source.config
    check_shapes(config, tensors.shapes(), str(source.path))
    if config.tie_word_embeddings and HEAD in tensors.shapes() and not tensors.identical(HEAD, EMBEDDING):
        raise UserError(f"config.json in {source.path} ties the head to the embedding, but the two tensors differ: set "
                        "tie_word_embeddings to false to use the stored head")
    return tensors


def stored_dtypes(config: ModelConfig, manifest: Mapping[str, Any]) -> dict[str, np.dtype]:
    """Canonical path -> element type in a converted checkpoint."""
    names = {path: manifest["tensors"][entry.parts[0].name]["dtype"] for path, entry in layout(config).items()}
    return {path: E4M3 if name == str(E4M3) else as_dtype(name) for path, name in names.items()}


def as_dtype(dtype: Any) -> np.dtype:
    """One of the element types that weights are stored in; raises UserError for any other."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in DTYPES.values():
        raise UserError(f"dtype {str(dtype)!r} is not supported for weights: use bfloat16, float16 or float32")
    return found


def sha256(tensor: np.ndarray | FP8Tensor) -> str:
    """Hexadecimal SHA-256 of a C-contiguous array's bytes; of FP8, of the values' and then the scales'."""
    parts = (tensor.values, tensor.scale) if isinstance(tensor, FP8Tensor) else (tensor,)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(as_bytes(part))
    return digest.hexdigest()


def progress(total_bytes: int, label: str) -> tqdm:
    """A progress bar in bytes on stderr, for work that lasts longer than a second."""
    return tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, delay=1, mininterval=0.5, file=sys.stderr)
