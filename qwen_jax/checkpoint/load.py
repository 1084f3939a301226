"""Loading of weights onto devices, straight in the wanted element type and sharding, a group of tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Sharding

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.hf_layout import EMBEDDING, HEAD, assemble, check_shapes, layout
from qwen_jax.checkpoint.safetensors_io import check_finite
from qwen_jax.checkpoint.source import Source, read_manifest, resolve
from qwen_jax.checkpoint.tensors import SCALE, as_dtype, open_tensors, progress, stored_dtypes
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.parallel.placement import Expand, Placement, leading, place, zeros
from qwen_jax.quantization import E4M3, INPUTS, Precision, QuantizedTensor

if TYPE_CHECKING:
    from qwen_jax.model.qwen2 import Qwen2


def load_model(ref: str | Path | Source, dtype: Any = "bfloat16") -> Qwen2:
    """Load a model as a Flax NNX module: ``model(tokens[B, T]) -> logits[B, T, V]`` in float32.

    Args:
      ref: a Hugging Face folder, a converted checkpoint, a hub id, or ``bundled``.
      dtype: element type of the parameters; None keeps the stored one.
    """
    from qwen_jax.model.abstract import build

    source = resolve(ref)
    config = source.config
    return build(config, load_params(source, config, dtype))


def load_params(source: Source, config: ModelConfig, dtype: Any = None,
                shardings: Mapping[str, Sharding] | None = None, precision: Precision | None = None,
                expand: Mapping[str, Expand] | None = None) -> dict[str, jax.Array | QuantizedTensor]:
    """Load a model's parameters onto devices; return them by path, such as ``layers.0.mlp.down``.

    Args:
      dtype: bfloat16, float16 or float32; None keeps what is stored.
      shardings: path -> sharding of the parameter; those not named go to the first local device. Parameters may be on
        different devices, and on those of other processes: every process then has to load, and holds what its own
        devices have of each parameter, which may be nothing. Scales of an 8-bit parameter have the leading axes of its
        sharding.
      precision: which parameters become 8-bit; by default none.
      expand: path -> `Placement.expand`, for the parameters whose shape changes.

    The order is that of ``hf_layout.layout``.
    From a converted checkpoint each process reads the chunks that its devices' shards overlap, and only parameters in
    ``expand`` whole. From a Hugging Face folder it reads every parameter of which it holds a shard, whole, one at a
    time. Host memory beyond the result stays within one group of tensors (256 MB, or the largest tensor).
    Raises UserError for damaged or mismatched weights, and for NaN or Inf in a Hugging Face folder's.
    """
    params = dict(iter_params(source, config, placements_for(config, dtype, shardings, precision, expand)))
    return {path: params[path] for path in layout(config)}


def placements_for(config: ModelConfig, dtype: Any = None, shardings: Mapping[str, Sharding] | None = None,
                   precision: Precision | None = None, expand: Mapping[str, Expand] | None = None
                   ) -> dict[str, Placement]:
    """Return how to load each parameter, by its path: sharding, element type, and 8-bit or not.

    Arguments are those of `load_params`.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {path: Placement((shardings or {}).get(path, default), None if dtype is None else as_dtype(dtype),
                            precision and precision.inputs(path), (expand or {}).get(path),
                            precision.weight_dtype(path) if precision else E4M3)
            for path in layout(config)}


def iter_params(source: Source, config: ModelConfig, placements: Mapping[str, Placement]
                ) -> Iterator[tuple[str, jax.Array | QuantizedTensor]]:
    """Load a model's parameters one at a time: yield each one's path and its array on the devices.

    The caller can free memory in between. Reads and raises as `load_params`, in the order that needs the least memory.
    """
    return (_from_orbax if source.kind == "orbax" else _from_folder)(source, config, placements)


def _from_folder(source: Source, config: ModelConfig, placements: Mapping[str, Placement]
                 ) -> Iterator[tuple[str, jax.Array | QuantizedTensor]]:
    # `place` gets arrays to which nothing else refers, here and in `_from_orbax`: so it can free them.
    table, tensors = layout(config), open_tensors(source)
    with progress(sum(entry.size for entry in table.values()), "loading") as bar:
        for path, entry in table.items():
            if placements[path].sharding.addressable_devices:
                read = partial(tensors.read, dtype=placements[path].dtype)
                yield path, place(assemble(entry, read), placements[path])
            else:
                yield path, place(zeros(entry.shape, tensors.dtype(entry.tensors[0].name)), placements[path])
            bar.update(entry.size)


def from_transformers(model: Any, dtype: Any = None) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """Return the config and the parameters, by path in our model, of a ``transformers.Qwen2ForCausalLM`` in memory.

    dtype: as of `load_params`. Values are copied. Raises UserError for any other class (adapters must be merged first),
    and for NaN or Inf.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    if not isinstance(model, Qwen2ForCausalLM):
        raise UserError(f"model must be a transformers Qwen2ForCausalLM, not {type(model).__name__}: merge adapters "
                        "and unwrap the model first")
    hf_config = {**model.config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    config, state = ModelConfig.from_hf(hf_config), model.state_dict()
    tied = config.tie_word_embeddings
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not (tied and name == HEAD)}
    check_shapes(config, shapes, "the transformers model")
    head, embedding = state.get(HEAD, state[EMBEDDING]), state[EMBEDDING]
    if tied and head.data_ptr() != embedding.data_ptr() and not torch.equal(head.cpu(), embedding.cpu()):
        raise UserError("the config of the transformers model ties the head to the embedding, but the two tensors "
                        "differ: set its tie_word_embeddings to False to use the head that the model has")

    def read(name: str) -> np.ndarray:
        if state[name].is_meta:
            raise UserError(f"{name} holds no values (a meta tensor): load the weights before passing the model")
        tensor = state[name].detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:  # torch hands NumPy no bfloat16
            array = tensor.view(torch.int16).numpy().view(as_dtype("bfloat16"))
        else:
            array = tensor.numpy()
            as_dtype(array.dtype)
        array = array.copy()  # the memory stays torch's, where training may go on
        check_finite(name, array)
        return array

    placements = placements_for(config, dtype)
    return config, {path: place(assemble(entry, read), placements[path]) for path, entry in layout(config).items()}


def _from_orbax(source: Source, config: ModelConfig, placements: Mapping[str, Placement]
                ) -> Iterator[tuple[str, jax.Array | QuantizedTensor]]:
    table, stored = layout(config), stored_dtypes(config, read_manifest(source))
    stand_ins = {path: _stand_in(path, entry.shape, stored[path]) for path, entry in table.items()}
    sizes = {path: entry.size * stored[path].itemsize for path, entry in table.items()}
    here = [path for path in table if placements[path].sharding.addressable_devices]
    for path in table:
        if not placements[path].sharding.addressable_devices:
            yield path, place(stand_ins[path], placements[path])
    # Parameters that are whole in memory for a while come first, the largest before the others: little else is there.
    whole = sorted((path for path in here if placements[path].expand), key=sizes.get, reverse=True)
    direct = [path for path in here if not placements[path].expand]
    with progress(sum(sizes[path] for path in here), "loading") as bar:
        for paths in (whole, direct):
            for group in orbax_store.groups({path: sizes[path] for path in paths}):
                targets: dict[str, Any] = {}
                for path in group:
                    targets |= _targets(path, stand_ins[path], placements[path])
                loaded = orbax_store.read(source.params, targets)
                for path in group:
                    yield path, place(_taken(loaded, path), placements[path])
                    bar.update(sizes[path])


def _taken(arrays: dict[str, Any], path: str) -> Any:
    """Remove a parameter, with its scales if it is FP8, from the arrays read from a checkpoint, and return it."""
    value = arrays.pop(path)
    return QuantizedTensor(value, arrays.pop(path + SCALE)) if path + SCALE in arrays else value


def _stand_in(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | QuantizedTensor:
    """Return zeros with the shape and type of a parameter of a converted checkpoint, without reading it."""
    if dtype != E4M3:
        return zeros(shape, dtype)
    outputs = len(shape) - INPUTS[path.removeprefix("layers.").partition(".")[2]]
    return QuantizedTensor(zeros(shape, dtype), zeros(shape[:outputs], np.dtype(np.float32)))


def _targets(path: str, stand_in: np.ndarray | QuantizedTensor, placement: Placement) -> dict[str, Any]:
    """Return the form in which `orbax_store.read` is to give each array of a parameter, by the array's name on disk."""
    eight_bit = isinstance(stand_in, QuantizedTensor)
    arrays = {path: stand_in.values, path + SCALE: stand_in.scale} if eight_bit else {path: stand_in}
    if placement.expand:
        return dict.fromkeys(arrays, np.ndarray)
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype if eight_bit else placement.dtype or array.dtype,
                                       sharding=leading(placement.sharding, array.ndim))
            for name, array in arrays.items()}
