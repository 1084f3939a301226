"""Weights into memory: straight to the wanted element type and sharding, a group of tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.conversion import SCALE, as_dtype, open_tensors, progress, stored_dtypes
from qwen_jax.checkpoint.hf_layout import HEAD, assemble, check_shapes, layout
from qwen_jax.checkpoint.safetensors_io import check_finite
from qwen_jax.checkpoint.source import Source, read_manifest, resolve
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
                shardings: Mapping[str, jax.sharding.Sharding] | None = None,
                precision: Precision | None = None) -> dict[str, jax.Array | FP8Tensor]:
    """Parameters by canonical path, in the order of ``hf_layout.layout``.

    Args:
      dtype: bfloat16, float16 or float32; None keeps what is stored.
      shardings: canonical path -> sharding; paths not named go to the first local device.
      precision: which parameters become 8-bit; by default none.

    Host memory beyond the result stays within one group of tensors (256 MB, or the largest tensor).
    Raises UserError for damaged or mismatched weights, and for NaN or Inf in a Hugging Face folder's.
    """
    params = dict(iter_params(source, config, dtype, shardings, precision))
    return {path: params[path] for path in layout(config)}


def iter_params(source: Source, config: ModelConfig, dtype: Any = None,
                shardings: Mapping[str, jax.sharding.Sharding] | None = None,
                precision: Precision | None = None) -> Iterator[tuple[str, jax.Array | FP8Tensor]]:
    """What `load_params` loads, one after another, so that the caller can let go of something for each."""
    for path, value in _iter_params(source, config, dtype, shardings):
        wanted = precision is not None and precision.inputs(path) is not None
        if isinstance(value, FP8Tensor) and not wanted:
            value = _dequantize(value, "bfloat16" if dtype is None else as_dtype(dtype).name)
        yield path, precision.store(path, value) if wanted else value


def _iter_params(source: Source, config: ModelConfig, dtype: Any,
                 shardings: Mapping[str, jax.sharding.Sharding] | None) -> Iterator[tuple[str, jax.Array]]:
    target = None if dtype is None else as_dtype(dtype)
    table = layout(config)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = {path: (shardings or {}).get(path, default) for path in table}
    if source.kind == "orbax":
        yield from _from_orbax(source, config, target, placed)
        return
    tensors = open_tensors(source)
    with progress(sum(entry.size for entry in table.values()), "loading") as bar:
        for path, entry in table.items():
            yield path, _place(assemble(entry, tensors.read), target, placed[path])
            bar.update(entry.size)


def from_transformers(model: Any, dtype: Any = None,
                      shardings: Mapping[str, jax.sharding.Sharding] | None = None
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
    params = {path: _place(assemble(entry, read), target, (shardings or {}).get(path, default))
              for path, entry in layout(config).items()}
    return config, params


def _from_orbax(source: Source, config: ModelConfig, target: np.dtype | None,
                placed: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
    table, stored = layout(config), stored_dtypes(config, read_manifest(source))
    eight_bit = {path for path in table if stored[path] == E4M3}
    wanted = {path: jax.ShapeDtypeStruct(entry.shape, stored[path] if path in eight_bit else target or stored[path],
                                         sharding=placed[path]) for path, entry in table.items()}
    for path in eight_bit:  # outputs come first, so a sharding of the values' axes says what becomes of the scales'
        rank = len(table[path].shape) - INPUTS[path.removeprefix("layers.").partition(".")[2]]
        wanted[path + SCALE] = jax.ShapeDtypeStruct(table[path].shape[:rank], np.float32,
                                                    sharding=_leading(placed[path], rank))
    sizes = {path: entry.size * stored[path].itemsize for path, entry in table.items()}
    with progress(sum(sizes.values()), "loading") as bar:
        for group in orbax_store.groups(sizes):
            names = [*group, *(path + SCALE for path in group if path in eight_bit)]
            loaded = orbax_store.read(source.params, {name: wanted[name] for name in names})
            for path in group:
                value = loaded.pop(path)
                yield path, FP8Tensor(value, loaded.pop(path + SCALE)) if path in eight_bit else value
            bar.update(sum(sizes[path] for path in group))


def _leading(sharding: jax.sharding.Sharding, rank: int) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.P(*tuple(sharding.spec)[:rank]))
    return sharding


@partial(jax.jit, static_argnums=1)
def _dequantize(tensor: FP8Tensor, dtype: str) -> jax.Array:
    return tensor.dequantize(dtype)


def _place(array: np.ndarray, target: np.dtype | None, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array onto devices: each device's part is cast and sent on its own."""
    dtype = target or array.dtype
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].astype(dtype, copy=False))
