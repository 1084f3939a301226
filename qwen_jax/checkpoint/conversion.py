"""Conversion between Hugging Face safetensors and Orbax checkpoints, in both directions, a few tensors at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.atomic import new_folder
from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.conversion_groups import GroupConverter
from qwen_jax.checkpoint.conversion_workers import write_in_processes
from qwen_jax.checkpoint.hf_layout import layout
from qwen_jax.checkpoint.safetensors_io import DTYPES, SafetensorsWriter, check_finite
from qwen_jax.checkpoint.source import (
    FORMAT_VERSION,
    GENERATION_CONFIG,
    MANIFEST,
    PARAMS,
    Source,
    copy_side_files,
    read_json,
    read_manifest,
    resolve,
)
from qwen_jax.checkpoint.tensors import SCALE, as_dtype, progress, sha256, split_stored, stored_dtypes
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization import E4M3, QuantizedTensor


def convert(src: str | Path, dst: str | Path, dtype: Any = None, fp8: bool = False, processes: int = 1) -> Path:
    """Convert a Hugging Face model to a new Orbax checkpoint folder.

    Args:
      src: a Hugging Face folder, a hub id, or ``bundled``.
      dst: the folder to create. It appears complete or not at all.
      dtype: element type to store, or None to keep every tensor bit for bit.
      fp8: store the matrices of all layers but the first and the last as e4m3, with a scale for each output channel.
      processes: number of processes of this machine that share the work. Each holds a group of tensors in memory, and
        the result does not depend on their number.

    Beside the parameters, ``dst`` holds config.json, generation_config.json, the tokenizer, and a manifest
    (``qwen_jax.json``) with the shape, element type and SHA-256 of every tensor as stored, under Hugging Face's names.

    Returns ``dst``. Raises UserError for bad input, an existing ``dst``, too little disk space, or a process that was
    killed.
    """
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise UserError(f"the number of processes must be a positive integer, not {processes!r}")
    source = resolve(src)
    if source.kind == "orbax":
        raise UserError(f"{source.path} is already converted: load it directly, or use export for a safetensors folder")
    target = None if dtype is None else as_dtype(dtype)
    converter = GroupConverter(source, target, fp8)
    with new_folder(dst, sum(converter.sizes.values())) as folder:
        if processes == 1:
            tensors = _write(folder / PARAMS, converter)
        else:
            tensors = write_in_processes(folder / PARAMS, converter, processes)
        hf_config = read_json(source.path / "config.json")
        hf_config.pop("quantization_config", None)  # it describes the source's weights, not these
        if target is not None:
            _set_dtype(hf_config, target)
        _write_json(folder / "config.json", hf_config)
        copy_side_files(source.path, folder)
        _write_json(folder / MANIFEST, {
            "format": "qwen-jax checkpoint",
            "format_version": FORMAT_VERSION,
            "dtype": _common({entry["dtype"] for entry in tensors.values()}),
            "source_dtype": _common({str(converter.source_dtype(name)) for name in tensors}),
            "config": hf_config,
            "files": {str(file.relative_to(folder)): file.stat().st_size
                      for file in sorted((folder / PARAMS).rglob("*")) if file.is_file()},
            "tensors": tensors,
        })
    return Path(dst)


def _write(folder: Path, converter: GroupConverter) -> dict[str, dict[str, Any]]:
    """Convert a model's parameters, group by group, into a new Orbax checkpoint at ``folder``.

    Returns the manifest's entry (element type, shape, SHA-256) of each tensor by its name.
    """
    tensors: dict[str, dict[str, Any]] = {}

    def converted() -> Iterator[dict[str, np.ndarray]]:
        with progress(sum(converter.sizes.values()), "converting") as bar:
            for group in converter.groups:
                arrays, entries = converter.convert(group)
                tensors.update(entries)
                bar.update(converter.group_bytes(group))
                yield arrays
                del arrays  # else they would be alive while the next group is read

    orbax_store.write(folder, converted())
    return tensors


def export(src: str | Path, dst: str | Path, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Write a converted checkpoint as a new Hugging Face folder that transformers loads.

    Tensors are written bit for bit as they were stored, FP8 as bfloat16, and each is checked against its SHA-256.
    Above ``max_shard_bytes`` the weights are split into shards with an index. A tied head is not stored.

    Returns ``dst``. Raises UserError for a damaged checkpoint, an existing ``dst``, or too little disk space.
    """
    source = resolve(src)
    if source.kind != "orbax":
        raise UserError(f"{src} is not converted: convert it first" if source.kind == "gguf" else
                        f"{src} is already a Hugging Face folder: export reads converted checkpoints")
    manifest, config = read_manifest(source), source.config
    hf_config = read_json(source.path / "config.json")
    dtypes = {path: DTYPES["BF16"] if dtype == E4M3 else dtype
              for path, dtype in stored_dtypes(config, manifest).items()}
    return _write_hf(Path(dst), config, hf_config, dtypes, _stored_arrays(source, manifest),
                     check=_checksums(source, manifest), max_shard_bytes=max_shard_bytes, side_files=source.path)


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
                    if not isinstance(tensor, QuantizedTensor):
                        check_finite(name, tensor)
                    check(name, tensor)
                bar.update(table[path].size)


def _stored_arrays(source: Source, manifest: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """Yield the path in our model and the stored value of every parameter of a converted checkpoint, group by group."""
    dtypes = stored_dtypes(source.config, manifest)
    sizes = {path: entry.size * dtypes[path].itemsize for path, entry in layout(source.config).items()}
    for group in orbax_store.groups(sizes):
        scales = [path + SCALE for path in group if dtypes[path] == E4M3]
        loaded = orbax_store.read(source.params, dict.fromkeys([*group, *scales], np.ndarray))
        for path in group:
            array = loaded.pop(path)
            yield path, QuantizedTensor(array, loaded.pop(path + SCALE)) if dtypes[path] == E4M3 else array


def _checksums(source: Source, manifest: Mapping[str, Any]) -> Callable[[str, np.ndarray | QuantizedTensor], None]:
    """Return a function that takes a tensor's name and value, and raises UserError when its SHA-256 is not that in the
    manifest."""
    def check(name: str, tensor: np.ndarray | QuantizedTensor) -> None:
        if manifest["tensors"].get(name, {}).get("sha256") != sha256(tensor):
            raise UserError(f"{name} in {source.path} differs from its SHA-256 in the manifest: the checkpoint is "
                            "damaged, convert it again")

    return check


def save_hf(model_or_params: Any, config: ModelConfig, dst: str | Path, tokenizer_files_from: str | Path | None = None,
            max_shard_bytes: int = 5_000_000_000, generation_config: Mapping[str, Any] | None = None) -> Path:
    """Write a model in memory as a new Hugging Face folder that transformers loads.

    Args:
      model_or_params: a ``Qwen2`` module, or its parameters by path (any of bfloat16, float16, float32).
      tokenizer_files_from: a folder whose tokenizer and generation config are copied, if given.
      generation_config: content of ``generation_config.json``, in the place of the copied one.

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
    return _write_hf(Path(dst), config, hf_config, dtypes, arrays, check=check_finite, max_shard_bytes=max_shard_bytes,
                     side_files=side_files, generation_config=generation_config)


def _write_hf(dst: Path, config: ModelConfig, hf_config: Mapping[str, Any], dtypes: Mapping[str, np.dtype],
              arrays: Iterator[tuple[str, np.ndarray | QuantizedTensor]], *, max_shard_bytes: int,
              side_files: Path | None, check: Callable[[str, np.ndarray | QuantizedTensor], None],
              generation_config: Mapping[str, Any] | None = None) -> Path:
    """Write parameters, given with their paths in our model, as a new Hugging Face folder, and return ``dst``.

    Args:
      dtypes: parameter path -> element type in the folder.
      check: function of each tensor's name and value that raises when the tensor must not be written.
      side_files: folder whose tokenizer and generation config are copied, or None.
      generation_config: content of ``generation_config.json``, in the place of the copied one.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    table = layout(config)
    specs = {tensor.name: (dtypes[path], tensor.shape) for path, entry in table.items() for tensor in entry.tensors}
    total = sum(entry.size * dtypes[path].itemsize for path, entry in table.items())
    with new_folder(dst, total) as folder, progress(total, "exporting") as bar:
        writer = SafetensorsWriter(folder, specs, int(max_shard_bytes))
        for path, array in arrays:
            for name, tensor in split_stored(table[path], array):
                check(name, tensor)
                if isinstance(tensor, QuantizedTensor):
                    tensor = (tensor.values.astype(np.float32) * tensor.scale[:, None]).astype(dtypes[path])
                writer.write(name, tensor)
                bar.update(tensor.nbytes)
            del array, tensor
        writer.close()
        _write_json(folder / "config.json", hf_config)
        if side_files is not None:
            copy_side_files(side_files, folder, config)
        if generation_config is not None:
            _write_json(folder / GENERATION_CONFIG, generation_config)
    return dst


def _set_dtype(hf_config: dict[str, Any], dtype: np.dtype) -> None:
    """Set the element type in a Hugging Face config: under ``dtype``, or under ``torch_dtype`` in older configs."""
    hf_config["dtype" if "dtype" in hf_config else "torch_dtype"] = str(dtype)


def _common(dtypes: set[str]) -> str:
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
