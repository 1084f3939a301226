"""8-bit floating point tensors: e4m3 values with a float32 scale for every output channel.

e4m3 has 4 exponent and 3 mantissa bits, no infinity, and 448 as its largest value (https://arxiv.org/abs/2209.05433).
A scale for every output channel is as exact as scales of 128 x 128 blocks, and can be applied to the result of a
product, which leaves the product itself to hardware that multiplies e4m3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
MOST = float(jnp.finfo(E4M3).max)  # 448


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP8Tensor:
    """A weight ``[*outputs, *inputs]``: ``values * scale``, with a scale for each output.

    Attributes:
      values: e4m3 ``[*outputs, *inputs]``; a product contracts the inputs.
      scale: float32 ``[*outputs]``.
      wide: products take their other operand as it is, instead of rounding it to e4m3 too.
    """

    values: jax.Array
    scale: jax.Array
    wide: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    @property
    def sharding(self) -> Any:
        """Of the values."""
        return self.values.sharding

    def dequantize(self, dtype) -> jax.Array:
        """The weight as a plain array."""
        return (self.values.astype(jnp.float32) * _over(self.scale, self.values.ndim)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainedInFP8:
    """A weight of more bits, of which products, forward and backward, are computed in 8 bits (`product`)."""

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def saturate(x: jax.Array, dtype=E4M3) -> jax.Array:
    """``x`` as an 8-bit float, clipped to its range: a plain cast gives NaN beyond it. NaN stays NaN."""
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def quantize(weight: jax.Array, inputs: int) -> FP8Tensor:
    """A weight whose last ``inputs`` axes a product contracts; its channels' largest values become 448.

    A channel of zeros has scale 1. Non-finite weights give non-finite scales: check before.
    """
    values, scale = scaled(weight, tuple(range(weight.ndim - inputs, weight.ndim)))
    return FP8Tensor(values, scale.reshape(weight.shape[:weight.ndim - inputs]))


def scaled(x: jax.Array, axes: tuple[int, ...], dtype=E4M3) -> tuple[jax.Array, jax.Array]:
    """``x`` as an 8-bit float with one scale over ``axes``, and the float32 scale, those axes of size 1."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / float(jnp.finfo(dtype).max))
    return saturate(wide / scale, dtype), scale


def quantize_host(weight: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """`quantize` in NumPy: e4m3 values and float32 scales."""
    wide = np.asarray(weight, np.float32)
    largest = np.max(np.abs(wide), axis=tuple(range(wide.ndim - inputs, wide.ndim)))
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(MOST)).astype(np.float32)
    scaled = wide / scale.reshape(scale.shape + (1,) * inputs)
    return np.clip(scaled, -MOST, MOST).astype(E4M3), scale


def matrix(weight: jax.Array | FP8Tensor | TrainedInFP8, inputs: int) -> jax.Array | FP8Tensor | TrainedInFP8:
    """``weight[*outputs, *inputs]``, of which the last ``inputs`` axes are inputs, as ``[outputs, inputs]``."""
    if isinstance(weight, FP8Tensor):
        outputs = weight.scale.size
        return replace(weight, values=weight.values.reshape(outputs, -1), scale=weight.scale.reshape(outputs))
    if isinstance(weight, TrainedInFP8):
        return TrainedInFP8(matrix(weight.value, inputs))
    return weight.reshape(-1, math.prod(weight.shape[-inputs:]))


def rows(weight: jax.Array | FP8Tensor, index: jax.Array, dtype) -> jax.Array:
    """``weight[index]`` as ``dtype``: an embedding's look-up."""
    taken = jax.tree.map(lambda x: jnp.take(x, index, axis=0), weight)
    return taken.dequantize(dtype) if isinstance(taken, FP8Tensor) else taken


def widened(tree: Any) -> Any:
    """A tree whose `FP8Tensor` are `wide`."""
    return jax.tree.map(lambda x: replace(x, wide=True) if isinstance(x, FP8Tensor) else x, tree,
                        is_leaf=lambda x: isinstance(x, FP8Tensor))


def _over(scale: jax.Array, ndim: int) -> jax.Array:
    return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
