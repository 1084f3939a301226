"""Weights into memory: straight to the wanted element type and sharding, a group of tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Sharding

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.device_placement import (
    Expand,
    absent,
    dequantized,
    leading,
    let_go,
    place,
    place_expanded,
    quantized,
    zeros,
)
from qwen_jax.checkpoint.hf_layout import HEAD, assemble, check_shapes, layout
from qwen_jax.checkpoint.safetensors_io import check_finite
from qwen_jax.checkpoint.source import Source, read_manifest, resolve
from qwen_jax.checkpoint.tensors import SCALE, as_dtype, open_tensors, progress, stored_dtypes
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization import E4M3, INPUTS, FP8Tensor, Precision

if TYPE_CHECKING:
    from qwen_jax.model.qwen2 import Qwen2


def load_model(ref: str | Path | Source, dtype: Any = "bfloat16", precision: Precision | None = None) -> Qwen2:
    """A Flax NNX module: ``model(tokens[B, T]) -> logits[B, T, V]`` in float32.

    Args:
      ref: a Hugging Face folder, a converted checkpoint, a hub id, or ``bundled``.
      dtype: element type of the parameters; None keeps the stored one.
      precision: which parameters become 8-bit as they are read; by default none.
    """
    from qwen_jax.model.abstract import build

    source = resolve(ref)
    config = source.config
    return build(config, load_params(source, config, dtype, precision=precision))


def load_params(source: Source, config: ModelConfig, dtype: Any = None,
                shardings: Mapping[str, Sharding] | None = None, precision: Precision | None = None,
                expand: Mapping[str, Expand] | None = None) -> dict[str, jax.Array | FP8Tensor]:
    """Parameters by canonical path, in the order of ``hf_layout.layout``.

    Args:
      dtype: bfloat16, float16 or float32; None keeps what is stored.
      shardings: canonical path -> sharding of the result; paths not named go to the first local device. Paths may be on
        different devices, and on those of other processes: every process then has to load, and holds what its own
        devices have of each parameter, which may be nothing. Scales of an 8-bit parameter have the leading axes of its
        sharding.
      precision: which parameters become 8-bit; by default none.
      expand: canonical path -> what turns the parameter as it is stored (a host array, or an `FP8Tensor` of two) into
        the one to place, for those whose shape differs. It must treat all indices of an axis that it does not change
        alike, because it is given some of them at a time.

    From a converted checkpoint each process reads the chunks that its devices' parts overlap, and only parameters in
    ``expand`` whole. From a Hugging Face folder it reads all parameters of which it holds a part whole, one at a time.
    Host memory beyond the result stays within one group of tensors (256 MB, or the largest tensor).
    Raises UserError for damaged or mismatched weights, and for NaN or Inf in a Hugging Face folder's.
    """
    params = dict(iter_params(source, config, dtype, shardings, precision, expand))
    return {path: params[path] for path in layout(config)}


def iter_params(source: Source, config: ModelConfig, dtype: Any = None,
                shardings: Mapping[str, Sharding] | None = None, precision: Precision | None = None,
                expand: Mapping[str, Expand] | None = None) -> Iterator[tuple[str, jax.Array | FP8Tensor]]:
    """What `load_params` loads, one after another, so that the caller can let go of something for each."""
    target = None if dtype is None else as_dtype(dtype)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = {path: (shardings or {}).get(path, default) for path in layout(config)}
    read = _from_orbax if source.kind == "orbax" else _from_folder
    for path, value in read(source, config, target, placed, expand or {}):
        inputs = None if precision is None else precision.inputs(path)
        if isinstance(value, FP8Tensor) and inputs is None:
            value = dequantized(value, "bfloat16" if target is None else target.name, placed[path])
        elif not isinstance(value, FP8Tensor) and inputs is not None:
            value = quantized(value, inputs, placed[path])
        yield path, value


def _from_folder(source: Source, config: ModelConfig, target: np.dtype | None, placed: Mapping[str, Sharding],
                 expand: Mapping[str, Expand]) -> Iterator[tuple[str, jax.Array]]:
    table, tensors = layout(config), open_tensors(source)
    with progress(sum(entry.size for entry in table.values()), "loading") as bar:
        for path, entry in table.items():
            if not placed[path].addressable_devices:
                form = zeros(entry.shape, tensors.dtype(entry.parts[0].name))
                yield path, absent(form, target, expand.get(path), placed[path])
                continue
            array = assemble(entry, tensors.read)
            value = (place_expanded(array, target, expand[path], placed[path]) if path in expand else
                     place(array, target, placed[path]))
            del array
            let_go(value)
            yield path, value
            bar.update(entry.size)


def from_transformers(model: Any, dtype: Any = None,
                      shardings: Mapping[str, Sharding] | None = None
                      ) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """The config and parameters of a ``transformers.Qwen2ForCausalLM`` in memory; arguments as ``load_params``.

    Values are copied. Raises UserError for any other class (adapters must be merged first), and for NaN or Inf.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    if not isinstance(model, Qwen2ForCausalLM):
        raise UserError(f"expected a transformers Qwen2ForCausalLM, got {type(model).__name__}: merge adapters and "
                        "unwrap the model first")
    hf_config = {**model.config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    config, state = ModelConfig.from_hf(hf_config), model.state_dict()
    target = None if dtype is None else as_dtype(dtype)
    tied = config.tie_word_embeddings
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if not (tied and name == HEAD)}
    check_shapes(config, found, "the transformers model")

    def read(name: str) -> np.ndarray:
        if state[name].is_meta:
            raise UserError(f"{name} holds no values (a meta tensor): load the weights before passing the model")
        tensor = state[name].detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:  # torch hands NumPy no bfloat16
            array = tensor.view(torch.int16).numpy().view(as_dtype("bfloat16"))
        else:
            array = tensor.numpy()
            as_dtype(array.dtype)
        array = array.copy()  # torch keeps owning its memory, and may train on in it
        check_finite(name, array)
        return array

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {path: place(assemble(entry, read), target, (shardings or {}).get(path, default))
              for path, entry in layout(config).items()}
    return config, params


def _from_orbax(source: Source, config: ModelConfig, target: np.dtype | None, placed: Mapping[str, Sharding],
                expand: Mapping[str, Expand]) -> Iterator[tuple[str, jax.Array | FP8Tensor]]:
    table, stored = layout(config), stored_dtypes(config, read_manifest(source))
    sizes = {path: entry.size * stored[path].itemsize for path, entry in table.items()}
    here = [path for path in table if placed[path].addressable_devices]
    for path in table:
        if not placed[path].addressable_devices:
            yield path, absent(_form(path, table[path].shape, stored[path]), target, expand.get(path), placed[path])
    # The largest of those that are whole in memory for a while come first, when there is little else.
    whole = sorted((path for path in here if path in expand), key=sizes.get, reverse=True)
    direct = [path for path in here if path not in expand]
    with progress(sum(sizes[path] for path in here), "loading") as bar:
        for paths in (whole, direct):
            for group in orbax_store.groups({path: sizes[path] for path in paths}):
                forms = {path: _form(path, table[path].shape, stored[path]) for path in group}
                loaded = orbax_store.read(source.params, _wanted(forms, target, placed, expand))
                for path in group:
                    value = loaded.pop(path)
                    if isinstance(forms[path], FP8Tensor):
                        value = FP8Tensor(value, loaded.pop(path + SCALE))
                    if path in expand:
                        value = place_expanded(value, target, expand[path], placed[path])
                    let_go(value)
                    yield path, value
                    bar.update(sizes[path])


def _form(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | FP8Tensor:
    """Zeros of a parameter's form in the checkpoint."""
    if dtype != E4M3:
        return zeros(shape, dtype)
    outputs = len(shape) - INPUTS[path.removeprefix("layers.").partition(".")[2]]
    return FP8Tensor(zeros(shape, dtype), zeros(shape[:outputs], np.dtype(np.float32)))


def _wanted(forms: Mapping[str, np.ndarray | FP8Tensor], target: np.dtype | None, placed: Mapping[str, Sharding],
            expand: Mapping[str, Expand]) -> dict[str, Any]:
    """What to ask `orbax_store.read` for."""
    wanted = {}
    for path, form in forms.items():
        arrays = {path: form.values, path + SCALE: form.scale} if isinstance(form, FP8Tensor) else {path: form}
        for name, array in arrays.items():
            dtype = array.dtype if len(arrays) > 1 else target or array.dtype
            wanted[name] = np.ndarray if path in expand else jax.ShapeDtypeStruct(
                array.shape, dtype, sharding=leading(placed[path], array.ndim))
    return wanted
