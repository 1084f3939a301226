"""Quantised tensors: e4m3 or int8 values with a scale for each output channel, int4 values with one for each group.

e4m3 has 4 exponent and 3 mantissa bits, no infinity, and 448 as its largest value (https://arxiv.org/abs/2209.05433).
A scale for every output channel is as exact as scales of 128 x 128 blocks, and can be applied to the result of a
product, which leaves the product itself to hardware that multiplies e4m3. int8 is four times as exact for the largest
values of a channel, and is for memory and for CPUs: products take the other operand as it is. So is int4, whose 16
values are too few for a whole channel: each 32 inputs of an output have a scale of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwen_kernels.cpu import GROUP, dequantize_int4, pack_int4

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
E4M3_MAX = float(jnp.finfo(E4M3).max)  # 448
INT8 = jnp.dtype(jnp.int8)
INT4 = jnp.dtype(jnp.int4)
INT8_MAX = 127.0  # the range of int8 without -128, which has no opposite
INT4_CANDIDATES = 8  # scales that are tried for each group


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedTensor:
    """Weight ``[*outputs, *inputs]`` in 8 bits or in 4: ``values`` times ``scale``.

    Attributes:
      values: e4m3 or int8 ``[*outputs, *inputs]``; a product contracts the inputs. int4 is packed (`pack_int4`): uint8,
        with half the size in the last axis.
      scale: float32 ``[*outputs]``. That of int4 is bfloat16 ``[*outputs, *inputs]`` with one for each `GROUP` of the
        last axis.
      wide: whether products with e4m3 take their other operand as it is, instead of rounding it to e4m3 too.
    """

    values: jax.Array
    scale: jax.Array
    wide: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.values.shape
        return (*shape[:-1], 2 * shape[-1]) if self.dtype == INT4 else shape

    @property
    def dtype(self) -> jnp.dtype:
        return INT4 if self.values.dtype == jnp.uint8 else self.values.dtype

    def dequantize(self, dtype) -> jax.Array:
        """Return the weight as a plain array of element type ``dtype``: values times scales."""
        if self.dtype == INT4:
            return dequantize_int4(self.values, self.scale).astype(dtype)
        return (self.values.astype(jnp.float32) * _over(self.scale, self.values.ndim)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainedInFP8:
    """Weight of more than 8 bits whose products, forward and backward, are computed in 8 bits (see `product`)."""

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def saturate(x: jax.Array, dtype=E4M3) -> jax.Array:
    """Cast ``x`` to an 8-bit float, clipped to its range: a plain cast gives NaN beyond it. NaN stays NaN."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def quantize(weight: jax.Array, inputs: int, dtype=E4M3) -> QuantizedTensor:
    """Quantise a weight whose last ``inputs`` axes a product contracts, with a scale for each output channel.

    Each channel's largest absolute value becomes 448, in int8 127; a channel of zeros has scale 1. Non-finite weights
    give non-finite scales: check before. int4: see `quantize_int4`.
    """
    if dtype == INT4:
        return quantize_int4(weight)
    values, scale = round_with_scale(weight, tuple(range(weight.ndim - inputs, weight.ndim)), dtype)
    return QuantizedTensor(values, scale.reshape(weight.shape[:weight.ndim - inputs]))


def quantize_int4(weight: jax.Array) -> QuantizedTensor:
    """Quantise a weight to int4, with the scale for each `GROUP` of its last axis that has the least squared error.

    The scales that are tried put a group's largest value, with its sign, between -8 and about -5.5: so large values may
    be clipped where this serves the others.
    """
    groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, GROUP)
    at = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    largest = jnp.take_along_axis(groups, at, axis=-1)

    def candidate(index):
        scale = largest / -(8 - 0.35 * index)
        scale = jnp.where(scale == 0, 1, scale).astype(jnp.bfloat16).astype(jnp.float32)
        integers = jnp.clip(jnp.round(groups / scale), -8, 7)
        return scale, integers, jnp.sum(jnp.square(integers * scale - groups), axis=-1, keepdims=True)

    def better(index, best):
        new = candidate(index)
        return jax.tree.map(lambda new_part, part: jnp.where(new[2] < best[2], new_part, part), new, best)

    scale, integers, _ = jax.lax.fori_loop(1, INT4_CANDIDATES, better, candidate(0))
    return QuantizedTensor(pack_int4(integers.reshape(weight.shape).astype(jnp.int8)),
                           scale[..., 0].astype(jnp.bfloat16))


def round_with_scale(x: jax.Array, axes: tuple[int, ...], dtype=E4M3) -> tuple[jax.Array, jax.Array]:
    """Round ``x`` to an 8-bit type with a common scale along ``axes``.

    Returns the values, and the float32 scales, in which those axes have size 1.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    most = INT8_MAX if dtype == INT8 else float(jnp.finfo(dtype).max)
    scale = jnp.where(largest == 0, 1, largest / most)
    return jnp.round(wide / scale).astype(INT8) if dtype == INT8 else saturate(wide / scale, dtype), scale


def quantize_host(weight: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a weight as `quantize` does, with NumPy: return e4m3 values and float32 scales."""
    wide = np.asarray(weight, np.float32)
    largest = np.max(np.abs(wide), axis=tuple(range(wide.ndim - inputs, wide.ndim)))
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(E4M3_MAX)).astype(np.float32)
    values = wide / scale.reshape(scale.shape + (1,) * inputs)
    return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(E4M3), scale


def matrix(weight: jax.Array | QuantizedTensor | TrainedInFP8, inputs: int
           ) -> jax.Array | QuantizedTensor | TrainedInFP8:
    """Reshape ``weight[*outputs, *inputs]``, whose last ``inputs`` axes are contracted, to ``[outputs, inputs]``."""
    if isinstance(weight, QuantizedTensor):
        if weight.dtype == INT4:
            return replace(weight, values=matrix(weight.values, inputs), scale=matrix(weight.scale, inputs))
        outputs = weight.scale.size
        return replace(weight, values=weight.values.reshape(outputs, -1), scale=weight.scale.reshape(outputs))
    if isinstance(weight, TrainedInFP8):
        return TrainedInFP8(matrix(weight.value, inputs))
    return weight.reshape(-1, math.prod(weight.shape[-inputs:]))


def rows(weight: jax.Array | QuantizedTensor, index: jax.Array, dtype) -> jax.Array:
    """Look up rows of an embedding table: return ``weight[index]``, dequantised to ``dtype`` if it is 8-bit."""
    values = jax.tree.map(lambda x: jnp.take(x, index, axis=0), weight)
    return values.dequantize(dtype) if isinstance(values, QuantizedTensor) else values


def widened(tree: Any) -> Any:
    """Mark each `QuantizedTensor` in a tree as `wide`: products then do not round their other operand to 8 bits."""
    return jax.tree.map(lambda x: replace(x, wide=True) if isinstance(x, QuantizedTensor) else x, tree,
                        is_leaf=lambda x: isinstance(x, QuantizedTensor))


def _over(scale: jax.Array, ndim: int) -> jax.Array:
    """Append axes of size 1 to a weight's scales, so that they broadcast against its ``ndim`` axes."""
    return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
