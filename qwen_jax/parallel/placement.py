"""Placement of arrays on devices: every weight of a file, a module or an update, adapters, and a step's arrays.

All of them go through this module. Each process sends to its own devices only the shards that they hold, and never
touches those of other processes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qwen_jax.quantization import E4M3, INT4, QuantizedTensor, quantize

_SLAB_BYTES = 32 << 20

Host = TypeVar("Host", np.ndarray, QuantizedTensor)
Expand = Callable[[Host], Host]


class Placement(NamedTuple):
    """Sharding and element type of one parameter on the devices, and changes of its shape on the way there.

    Attributes:
      sharding: sharding of the result; the scales of an 8-bit parameter have the leading axes of it.
      dtype: element type of a result that is not quantised; None keeps the type that the parameter has.
      inputs: number of last axes that a product contracts, for a parameter that is to be quantised; None for others.
      quantized: element type of a parameter that is to be quantised.
      expand: function that makes the array to place from the parameter on the host, where their shapes differ. It must
        treat all indices of an axis that it does not change alike, because it gets some of them at a time.
    """

    sharding: Sharding
    dtype: np.dtype | None = None
    inputs: int | None = None
    expand: Expand | None = None
    quantized: np.dtype = E4M3


def place(value: Any, placement: Placement) -> Any:
    """Return a parameter on devices, expanded, cast and quantised as ``placement`` says.

    Args:
      value: the whole parameter: a NumPy array, which must be the same in every process, an array on devices, a
        `QuantizedTensor` of either, or shapes (``jax.ShapeDtypeStruct``), of which shapes with shardings are made.

    An expanded parameter is never whole on the host: its shards are filled a slab at a time. A host array to which the
    caller keeps no reference is freed before anything is quantised.
    """
    sharding, dtype, inputs, expand, quantized = placement
    value = put(value, sharding, dtype) if expand is None else _put_expanded(value, sharding, dtype, expand)
    if isinstance(jax.tree.leaves(value)[0], jax.Array):
        # jaxlib keeps the host's arrays until Python next collects garbage: without this several would be alive.
        jax.block_until_ready(value)
        gc.collect(0)
    if isinstance(value, QuantizedTensor):
        if inputs is not None and value.dtype == quantized:
            return value
        value = _dequantized(value, dtype, sharding)
    return value if inputs is None else _quantized(value, inputs, sharding, quantized)


def put(value: Any, sharding: Sharding, dtype: np.dtype | None = None) -> Any:
    """Return ``value`` as an array with ``sharding``, or a `QuantizedTensor` whose scales are split by its leading
    axes.

    value: as in `place`. dtype: to cast a NumPy array or a shape to; 8-bit tensors and arrays on devices keep theirs.
    Raises NotImplementedError for an array of several processes that would have to move.
    """
    if isinstance(value, QuantizedTensor):
        scale = put(value.scale, leading(sharding, value.scale.ndim))
        return replace(value, values=put(value.values, sharding), scale=scale)
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, dtype or value.dtype, sharding=sharding)
    on_devices = isinstance(value, jax.Array)
    if sharding.is_fully_addressable and (on_devices or dtype is None or dtype == value.dtype):
        return jax.device_put(value, sharding)
    if on_devices and not value.is_fully_addressable:
        if value.sharding != sharding:
            raise NotImplementedError("moving an array of several processes")
        return value
    host = np.asarray(value)
    dtype = dtype or host.dtype
    if not sharding.addressable_devices:
        return _without_shards(jax.ShapeDtypeStruct(host.shape, dtype, sharding=sharding))
    return jax.make_array_from_callback(host.shape, sharding,
                                        lambda index: host[index].astype(dtype, copy=False), dtype)


def leading(sharding: Sharding, rank: int) -> Sharding:
    """Return the sharding of an array's first ``rank`` axes, such as the scales of an 8-bit parameter have."""
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > rank:
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:rank]), memory_kind=sharding.memory_kind)
    return sharding


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a host array of zeros that takes no memory: a stand-in where only the shape matters."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _put_expanded(value: Any, sharding: Sharding, dtype: np.dtype | None, expand: Expand) -> Any:
    axis, expanded = _expanded_shapes(value, expand)
    shapes = put(expanded, sharding, dtype)
    if isinstance(jax.tree.leaves(value)[0], jax.ShapeDtypeStruct):
        return shapes
    if not sharding.addressable_devices:
        return jax.tree.map(_without_shards, shapes)
    value = jax.tree.map(np.asarray, value)
    leaves, tree = jax.tree.flatten(shapes)
    shards_of_leaf = [_empty_shards(leaf) for leaf in leaves]
    length = 1 if axis is None else expanded.shape[axis]
    step = max(1, length * _SLAB_BYTES // max(1, leaves[0].size * leaves[0].dtype.itemsize))
    for start in range(0, length, step):
        slab = expand(value if axis is None else _slice(value, axis, start, start + step))
        for part, shards in zip(jax.tree.leaves(slab), shards_of_leaf, strict=True):
            for bounds, shard in shards.items():
                _copy_overlap(part, shard, bounds, axis, start)
    return jax.tree.unflatten(tree, [
        jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, leaf=leaf, shards=shards:
                                     shards[_bounds(index, leaf.shape)], leaf.dtype)
        for leaf, shards in zip(leaves, shards_of_leaf, strict=True)])


def _expanded_shapes(value: Any, expand: Expand) -> tuple[int | None, Any]:
    """Return an axis along which ``expand`` can work slab by slab, or None, and the shapes of its result.

    The axis is the last one of more than one index that ``expand`` leaves alone.

    It leaves an axis alone when a single index stays one: heads to copy and columns to add change that.
    """
    stub = jax.tree.map(lambda leaf: zeros(leaf.shape, leaf.dtype), value)
    for axis, length in reversed(list(enumerate(value.shape))):
        if length > 1:
            expanded = expand(_slice(stub, axis, 0, 1))
            if expanded.shape[axis] == 1:
                return axis, _shapes(expanded, axis, length)
    return None, _shapes(expand(stub))


def _shapes(value: Host, axis: int | None = None, length: int = 1) -> Any:
    """Return the shapes of a parameter's arrays, with ``length`` indices of ``axis`` in place of those it has."""
    def of_leaf(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([length if at == axis else size for at, size in enumerate(leaf.shape)], leaf.dtype)

    return jax.tree.map(of_leaf, value)


def _slice(value: Host, axis: int, start: int, stop: int) -> Host:
    """Return ``[start:stop]`` of one axis of a parameter; scales that do not have the axis are returned whole."""
    return jax.tree.map(lambda leaf: leaf[(slice(None),) * axis + (slice(start, stop),)] if axis < leaf.ndim else leaf,
                        value)


def _empty_shards(leaf: jax.ShapeDtypeStruct) -> dict[tuple, np.ndarray]:
    """Return uninitialised host arrays for the different shards of this process's devices, by the shards' bounds."""
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    bounds = {_bounds(index, leaf.shape) for index in indices}
    return {shard: np.empty([stop - start for start, stop in shard], leaf.dtype) for shard in bounds}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return a shard's bounds, the first index and the last + 1 of each axis, from its slices of the array."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _copy_overlap(slab: np.ndarray, shard: np.ndarray, bounds: tuple[tuple[int, int], ...], axis: int | None,
                  start: int) -> None:
    """Copy and cast the part of a slab, which begins at ``start`` of ``axis``, that a shard with these bounds holds."""
    source = [slice(*limits) for limits in bounds]
    if axis is None or axis >= slab.ndim:
        shard[...] = slab[tuple(source)]
        return
    first, last = bounds[axis]
    low, high = max(first, start), min(last, start + slab.shape[axis])
    if low < high:
        source[axis] = slice(low - start, high - start)
        shard[(slice(None),) * axis + (slice(low - first, high - first),)] = slab[tuple(source)]


def _without_shards(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array of which this process holds nothing, because its sharding has none of the process's devices."""
    return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, [], dtype=shape.dtype)


def _quantized(value: Any, inputs: int, sharding: Sharding, dtype: np.dtype) -> QuantizedTensor:
    """Quantise an array or a shape to a `QuantizedTensor`, where a product contracts the last ``inputs`` axes."""
    scales = sharding if dtype == INT4 else leading(sharding, value.ndim - inputs)
    if sharding.addressable_devices and isinstance(value, jax.Array):
        return _quantizer(inputs, dtype, sharding, scales)(value)
    shapes = put(jax.eval_shape(partial(quantize, inputs=inputs, dtype=dtype), value), sharding)
    return jax.tree.map(_without_shards, shapes) if isinstance(value, jax.Array) else shapes


def _dequantized(value: QuantizedTensor, dtype: np.dtype | None, sharding: Sharding) -> Any:
    """Return an 8-bit parameter, or its shape, dequantised to ``dtype`` (None: bfloat16)."""
    dtype = jnp.dtype(jnp.bfloat16) if dtype is None else dtype
    if sharding.addressable_devices and isinstance(value.values, jax.Array):
        return _dequantizer(dtype.name, sharding)(value)
    shape = jax.ShapeDtypeStruct(value.shape, dtype, sharding=sharding)
    return _without_shards(shape) if isinstance(value.values, jax.Array) else shape


@cache
def _quantizer(inputs: int, dtype: np.dtype, values: Sharding, scales: Sharding
               ) -> Callable[[jax.Array], QuantizedTensor]:
    return jax.jit(partial(quantize, inputs=inputs, dtype=dtype), out_shardings=QuantizedTensor(values, scales))


@cache
def _dequantizer(dtype: str, sharding: Sharding) -> Callable[[QuantizedTensor], jax.Array]:
    return jax.jit(lambda tensor: tensor.dequantize(dtype), out_shardings=sharding)
