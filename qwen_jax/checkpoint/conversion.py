"""Conversion both ways: Hugging Face safetensors to an Orbax checkpoint and back, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.atomic import new_folder
from qwen_jax.checkpoint.calibrated import read_calibrated
from qwen_jax.checkpoint.hf_layout import EMBEDDING, HEAD, Entry, assemble, check_shapes, layout, split
from qwen_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFolder, SafetensorsWriter, as_bytes, check_finite
from qwen_jax.checkpoint.source import (
    FORMAT_VERSION,
    MANIFEST,
    PARAMS,
    Source,
    copy_side_files,
    read_json,
    read_manifest,
    resolve,
)
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization import E4M3, FP8Tensor, Precision, default_precision, quantize_host

SCALE = ".scale"  # of an FP8 parameter, beside its values


def convert(src: str | Path, dst: str | Path, dtype: Any = None, fp8: bool = False) -> Path:
    """Convert a Hugging Face model to a new Orbax checkpoint folder.

    Args:
      src: a Hugging Face folder, a hub id, or ``bundled``.
      dst: the folder to create. It appears complete or not at all.
      dtype: element type to store, or None to keep every tensor bit for bit.
      fp8: store the matrices of all layers but the first and the last as e4m3, with a scale for each output channel.

    Beside the parameters, ``dst`` holds config.json, generation_config.json, the tokenizer, and a manifest
    (``qwen_jax.json``) with the shape, element type and SHA-256 of every tensor as stored, under Hugging Face's names.

    Returns ``dst``. Raises UserError for bad input, an existing ``dst``, or too little disk space.
    """
    source = resolve(src)
    if source.kind == "orbax":
        raise UserError(f"{source.path} is already converted: load it directly, or use export for a safetensors folder")
    target = None if dtype is None else as_dtype(dtype)
    config, tensors = source.config, open_tensors(source)
    table = _by_position(layout(config), tensors)
    stored = {path: target or tensors.dtype(entry.parts[0].name) for path, entry in table.items()}
    sizes = {path: entry.size * stored[path].itemsize for path, entry in table.items()}
    found = read_calibrated(source.path, config) if fp8 else None
    # Tables are rounded when they are loaded: other readers of a checkpoint do not expect them in 8 bits.
    precision = Precision(found.precision.weights) if found else default_precision(config, fp8, None)
    manifest: dict[str, Any] = {}

    def read(name: str) -> np.ndarray:
        tensor = tensors.read(name)
        if target is not None and tensor.dtype != target:
            tensor = tensor.astype(target)
            check_finite(name, tensor)
        return tensor

    def store(path: str, array: np.ndarray) -> np.ndarray | FP8Tensor:
        inputs = precision.inputs(path)
        kept = array if inputs is None else FP8Tensor(*quantize_host(array, inputs))
        for name, tensor in split_stored(table[path], kept):
            manifest[name] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": sha256(tensor)}
        return kept

    with new_folder(dst, sum(sizes.values())) as folder:
        orbax_store.write(folder / PARAMS, _pieces(table, sizes, read, store, "converting"))
        hf_config = read_json(source.path / "config.json")
        hf_config.pop("quantization_config", None)  # what it says of the source's weights does not hold here
        if target is not None:
            _set_dtype(hf_config, target)
        _write_json(folder / "config.json", hf_config)
        copy_side_files(source.path, folder)
        _write_json(folder / MANIFEST, {
            "format": "qwen-jax checkpoint",
            "format_version": FORMAT_VERSION,
            "dtype": _common({entry["dtype"] for entry in manifest.values()}),
            "source_dtype": _common({str(tensors.dtype(name)) for name in manifest}),
            "config": hf_config,
            "files": {str(file.relative_to(folder)): file.stat().st_size
                      for file in sorted((folder / PARAMS).rglob("*")) if file.is_file()},
            "tensors": manifest,
        })
    return Path(dst)


def export(src: str | Path, dst: str | Path, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Write a converted checkpoint as a new Hugging Face folder that transformers loads.

    Tensors come out bit for bit as they were stored, FP8 ones as bfloat16, and each is checked against the manifest's
    SHA-256 on the way.
    Above ``max_shard_bytes`` the weights are split into shards with an index. A tied head is not stored.

    Returns ``dst``. Raises UserError for a damaged checkpoint, an existing ``dst``, or too little disk space.
    """
    source = resolve(src)
    if source.kind != "orbax":
        raise UserError(f"{source.path} is already a Hugging Face folder: export reads converted checkpoints")
    manifest, config = read_manifest(source), source.config
    hf_config = read_json(source.path / "config.json")
    dtypes = {path: DTYPES["BF16"] if dtype == E4M3 else dtype
              for path, dtype in stored_dtypes(config, manifest).items()}
    _write_hf(config, hf_config, dtypes, _stored_arrays(source, manifest), Path(dst), max_shard_bytes, source.path,
              _checksums(source, manifest))
    return Path(dst)


def verify(src: str | Path | Source) -> None:
    """Compare every tensor of a converted checkpoint with its SHA-256; UserError names one that differs.

    A Hugging Face folder has no checksums: nothing is done.
    """
    source = resolve(src)
    if source.kind == "orbax":
        manifest, table = read_manifest(source), layout(source.config)
        check = _checksums(source, manifest)
        with progress(sum(entry.size for entry in table.values()), "verifying") as bar:
            for path, array in _stored_arrays(source, manifest):
                for name, tensor in split_stored(table[path], array):
                    if not isinstance(tensor, FP8Tensor):
                        check_finite(name, tensor)
                    check(name, tensor)
                bar.update(table[path].size)


def _stored_arrays(source: Source, manifest: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray | FP8Tensor]]:
    """Canonical paths and parameters as they are stored, a group in memory at a time."""
    dtypes = stored_dtypes(source.config, manifest)
    sizes = {path: entry.size * dtypes[path].itemsize for path, entry in layout(source.config).items()}
    for group in orbax_store.groups(sizes):
        scales = [path + SCALE for path in group if dtypes[path] == E4M3]
        loaded = orbax_store.read(source.params, dict.fromkeys([*group, *scales], np.ndarray))
        for path in group:
            array = loaded.pop(path)
            yield path, FP8Tensor(array, loaded.pop(path + SCALE)) if dtypes[path] == E4M3 else array


def split_stored(entry: Entry, stored: np.ndarray | FP8Tensor) -> Iterator[tuple[str, np.ndarray | FP8Tensor]]:
    """Each Hugging Face tensor of a parameter: its name, and its value or, of FP8, its rows and their scales."""
    if not isinstance(stored, FP8Tensor):
        yield from split(entry, stored)
        return
    for part, (name, values) in zip(entry.parts, split(entry, stored.values), strict=True):
        yield name, FP8Tensor(values, np.ascontiguousarray(stored.scale[part.index]).reshape(-1))


def _checksums(source: Source, manifest: Mapping[str, Any]) -> Callable[[str, np.ndarray | FP8Tensor], None]:
    def check(name: str, tensor: np.ndarray | FP8Tensor) -> None:
        if manifest["tensors"].get(name, {}).get("sha256") != sha256(tensor):
            raise UserError(f"{name} in {source.path} differs from its SHA-256 in the manifest: the checkpoint is "
                            "damaged, convert it again")

    return check


def save_hf(model_or_params: Any, config: ModelConfig, dst: str | Path, tokenizer_files_from: str | Path | None = None,
            max_shard_bytes: int = 5_000_000_000) -> Path:
    """Write a model in memory as a new Hugging Face folder that transformers loads.

    Args:
      model_or_params: a ``Qwen2`` module, or its parameters by canonical path (any of bfloat16, float16, float32).
      tokenizer_files_from: a folder whose tokenizer and generation config are copied, if given.

    Returns ``dst``. Raises UserError as ``export`` does, and for NaN or Inf in a parameter.
    """
    if isinstance(model_or_params, Mapping):
        params = model_or_params
    else:
        from qwen_jax.model.abstract import params_of

        params = params_of(model_or_params)
    table = layout(config)
    wrong = {path for path in table.keys() | params.keys()
             if path not in params or path not in table or tuple(params[path].shape) != table[path].shape}
    if wrong:
        raise UserError(f"parameters do not match the config (missing, unexpected or misshapen): {sorted(wrong)[:8]}")
    dtypes = {path: as_dtype(params[path].dtype) for path in table}
    hf_config = config.to_hf()
    _set_dtype(hf_config, dtypes["embed.weight"])
    arrays = ((path, np.asarray(params[path])) for path in table)
    side_files = None if tokenizer_files_from is None else Path(tokenizer_files_from)
    _write_hf(config, hf_config, dtypes, arrays, Path(dst), max_shard_bytes, side_files, check_finite)
    return Path(dst)


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


def _by_position(table: Mapping[str, Entry], tensors: SafetensorsFolder) -> dict[str, Entry]:
    """The table in the order its tensors lie on disk: shard by shard."""
    return dict(sorted(table.items(), key=lambda item: min(tensors.position(part.name) for part in item[1].parts)))


def _pieces(table: Mapping[str, Entry], sizes: Mapping[str, int], read: Callable[[str], np.ndarray],
            store: Callable[[str, np.ndarray], np.ndarray | FP8Tensor], label: str) -> Iterator[dict[str, np.ndarray]]:
    with progress(sum(sizes.values()), label) as bar:
        for group in orbax_store.groups({path: sizes[path] for path in table}):
            piece = {}
            for path in group:
                kept = store(path, assemble(table[path], read))
                if isinstance(kept, FP8Tensor):
                    piece[path], piece[path + SCALE] = kept.values, kept.scale
                else:
                    piece[path] = kept
                del kept  # else it would be alive while the next group is read
                bar.update(sizes[path])
            yield piece


def _write_hf(config: ModelConfig, hf_config: Mapping[str, Any], dtypes: Mapping[str, np.dtype],
              arrays: Iterator[tuple[str, np.ndarray]], dst: Path, max_shard_bytes: int, side_files: Path | None,
              check: Callable[[str, np.ndarray], None]) -> None:
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    table = layout(config)
    specs = {part.name: (dtypes[path], part.shape) for path, entry in table.items() for part in entry.parts}
    total = sum(entry.size * dtypes[path].itemsize for path, entry in table.items())
    with new_folder(dst, total) as folder, progress(total, "exporting") as bar:
        writer = SafetensorsWriter(folder, specs, int(max_shard_bytes))
        for path, array in arrays:
            for name, tensor in split_stored(table[path], array):
                check(name, tensor)
                if isinstance(tensor, FP8Tensor):
                    tensor = (tensor.values.astype(np.float32) * tensor.scale[:, None]).astype(dtypes[path])
                writer.write(name, tensor)
                bar.update(tensor.nbytes)
            del array, tensor
        writer.close()
        _write_json(folder / "config.json", hf_config)
        if side_files is not None:
            copy_side_files(side_files, folder)


def _set_dtype(hf_config: dict[str, Any], dtype: np.dtype) -> None:
    """Name the element type under the spelling the config uses (transformers 5 writes ``dtype``)."""
    hf_config["dtype" if "dtype" in hf_config else "torch_dtype"] = str(dtype)


def _common(dtypes: set[str]) -> str:
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
