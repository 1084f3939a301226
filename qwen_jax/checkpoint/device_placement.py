"""Parameters onto devices: each process places its own devices' parts, and looks at nobody else's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qwen_jax.quantization import FP8Tensor, quantize

_SLAB_BYTES = 32 << 20

Host = TypeVar("Host", np.ndarray, FP8Tensor)
Expand = Callable[[Host], Host]


def place(array: np.ndarray, target: np.dtype | None, sharding: Sharding) -> jax.Array:
    """A host array onto devices: each device's part is cast and sent on its own."""
    dtype = target or array.dtype
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].astype(dtype, copy=False),
                                        dtype)


def place_expanded(value: Host, target: np.dtype | None, expand: Expand, sharding: Sharding) -> jax.Array | FP8Tensor:
    """What ``expand`` makes of a parameter, on devices: ``sharding`` is the result's, of FP8 its values'.

    The result is never whole on the host. It is made a slab at a time, along an axis that ``expand`` leaves alone, and
    of each slab the parts of this process's devices are kept.
    """
    axis, form = _form(value, expand)
    target = value.dtype if target is None or isinstance(value, FP8Tensor) else target
    leaves, tree = jax.tree.flatten(form)
    shardings = [leading(sharding, len(leaf.shape)) for leaf in leaves]
    dtypes = [target, *(leaf.dtype for leaf in leaves[1:])]
    parts = [_empty_parts(leaf.shape, dtype, one) for leaf, dtype, one in zip(leaves, dtypes, shardings, strict=True)]
    size = 1 if axis is None else form.shape[axis]
    step = max(1, size * _SLAB_BYTES // max(1, leaves[0].size * target.itemsize))
    for start in range(0, size, step):
        slab = expand(value if axis is None else _slab(value, axis, start, start + step))
        for leaf, mine in zip(jax.tree.leaves(slab), parts, strict=True):
            for bounds, part in mine.items():
                _copy_overlap(leaf, part, bounds, axis, start)
    placed = [jax.make_array_from_callback(leaf.shape, one, lambda index, leaf=leaf, mine=mine:
                                           mine[_bounds(index, leaf.shape)], dtype)
              for leaf, dtype, one, mine in zip(leaves, dtypes, shardings, parts, strict=True)]
    return jax.tree.unflatten(tree, placed)


def absent(like: Host, target: np.dtype | None, expand: Expand | None, sharding: Sharding) -> jax.Array | FP8Tensor:
    """A parameter of which this process holds no part, because ``sharding`` has none of its devices."""
    form = _form(like, expand)[1] if expand else like
    keep = target is None or isinstance(like, FP8Tensor)
    return jax.tree.map(lambda leaf: _without_parts(leaf.shape, leaf.dtype if keep else target,
                                                    leading(sharding, len(leaf.shape))), form)


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A host array of zeros that takes no memory, for its shape."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def leading(sharding: Sharding, rank: int) -> Sharding:
    """A sharding for an array with the first ``rank`` of the axes that ``sharding`` is for, such as scales."""
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > rank:
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:rank]), memory_kind=sharding.memory_kind)
    return sharding


def quantized(value: jax.Array, inputs: int, sharding: Sharding) -> FP8Tensor:
    """``value`` as e4m3, of which a product contracts the last ``inputs`` axes."""
    shardings = FP8Tensor(sharding, leading(sharding, value.ndim - inputs))
    if not sharding.addressable_devices:
        form = jax.eval_shape(partial(quantize, inputs=inputs), value)
        return jax.tree.map(lambda leaf, one: _without_parts(leaf.shape, leaf.dtype, one), form, shardings)
    return _quantizer(inputs, shardings.values, shardings.scale)(value)


def dequantized(tensor: FP8Tensor, dtype: str, sharding: Sharding) -> jax.Array:
    """`FP8Tensor` as a plain array."""
    if not sharding.addressable_devices:
        return _without_parts(tensor.shape, dtype, sharding)
    return _dequantizer(dtype, sharding)(tensor)


def let_go(value: jax.Array | FP8Tensor) -> None:
    """Wait for a placed parameter, and free the host arrays it came from: jaxlib keeps them until Python next collects
    garbage, so that loading would hold several of the largest at once."""
    jax.block_until_ready(value)
    gc.collect(0)


@cache
def _quantizer(inputs: int, values: Sharding, scale: Sharding):
    return jax.jit(partial(quantize, inputs=inputs), out_shardings=FP8Tensor(values, scale))


@cache
def _dequantizer(dtype: str, sharding: Sharding):
    return jax.jit(lambda tensor: tensor.dequantize(dtype), out_shardings=sharding)


def _form(value: Host, expand: Expand) -> tuple[int | None, Host]:
    """An axis that ``expand`` leaves alone, the last of more than one index, and zeros of the result's form.

    One index of an axis that it acts along (heads to copy, columns to add) does not stay one.
    """
    stub = jax.tree.map(lambda leaf: zeros(leaf.shape, leaf.dtype), value)
    for axis in reversed(range(len(value.shape))):
        if value.shape[axis] > 1:
            found = expand(_slab(stub, axis, 0, 1))
            if found.shape[axis] == 1:
                return axis, jax.tree.map(lambda leaf, axis=axis: zeros(
                    (*leaf.shape[:axis], value.shape[axis], *leaf.shape[axis + 1:]) if axis < leaf.ndim else leaf.shape,
                    leaf.dtype), found)
    return None, jax.tree.map(lambda leaf: zeros(leaf.shape, leaf.dtype), expand(stub))


def _slab(value: Host, axis: int, start: int, stop: int) -> Host:
    """Some indices of an axis; scales that do not have it, whole."""
    return jax.tree.map(lambda leaf: leaf[(slice(None),) * axis + (slice(start, stop),)] if axis < leaf.ndim else leaf,
                        value)


def _empty_parts(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> dict[tuple, np.ndarray]:
    """Room for each different part of an array that this process's devices hold, by the part's bounds."""
    bounds = {_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    return {one: np.empty([stop - start for start, stop in one], dtype) for one in bounds}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last + 1 of each axis."""
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _copy_overlap(slab: np.ndarray, part: np.ndarray, bounds: tuple[tuple[int, int], ...], axis: int | None,
                  start: int) -> None:
    """Into ``part``, which is ``bounds`` of the whole, what it shares with a slab that begins at ``start``: cast."""
    source = [slice(*one) for one in bounds]
    if axis is None or axis >= slab.ndim:
        part[...] = slab[tuple(source)]
        return
    first, last = bounds[axis]
    low, high = max(first, start), min(last, start + slab.shape[axis])
    if low < high:
        source[axis] = slice(low - start, high - start)
        part[(slice(None),) * axis + (slice(low - first, high - first),)] = slab[tuple(source)]


def _without_parts(shape: tuple[int, ...], dtype, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=dtype)
