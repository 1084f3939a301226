"""8-bit floating point weights: e4m3 values with a float32 scale for every output channel.

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


def saturate(x: jax.Array, dtype=E4M3) -> jax.Array:
    """``x`` as an 8-bit float, clipped to its range: a plain cast gives NaN beyond it. NaN stays NaN."""
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def quantize(weight: jax.Array, inputs: int) -> FP8Tensor:
    """A weight whose last ``inputs`` axes a product contracts; its channels' largest values become 448.

    A channel of zeros has scale 1. Non-finite weights give non-finite scales: check before.
    """
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(wide.ndim - inputs, wide.ndim)))
    scale = jnp.where(largest == 0, 1, largest / MOST)
    return FP8Tensor(saturate(wide / _over(scale, wide.ndim)), scale)


def quantize_host(weight: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """`quantize` in NumPy: e4m3 values and float32 scales."""
    wide = np.asarray(weight, np.float32)
    largest = np.max(np.abs(wide), axis=tuple(range(wide.ndim - inputs, wide.ndim)))
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(MOST)).astype(np.float32)
    scaled = wide / scale.reshape(scale.shape + (1,) * inputs)
    return np.clip(scaled, -MOST, MOST).astype(E4M3), scale


def product(spec: str, x: jax.Array, weight: jax.Array | FP8Tensor, result=None) -> jax.Array:
    """``einsum`` of ``x`` and a weight, accumulated in float32 and rounded once, to ``result`` or x's element type.

    The weight's output axes come first in its part of ``spec`` and last in the result's. With an e4m3 weight, ``x``
    is rounded to e4m3 as well, with a scale for each vector that is contracted (unless the weight is `wide`).
    """
    result = result or x.dtype
    if not isinstance(weight, FP8Tensor):
        return jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32).astype(result)
    if weight.wide:
        out = jnp.einsum(spec, x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
    else:
        rounded = quantize(x, 1)  # a vector with NaN or Inf gives NaN
        # Where nothing multiplies e4m3, bf16 holds the same numbers.
        operand = E4M3 if jax.default_backend() == "gpu" else jnp.bfloat16
        out = jnp.einsum(spec, rounded.values.astype(operand), weight.values.astype(operand),
                         preferred_element_type=jnp.float32) * rounded.scale[..., None]
    *batch, outputs = weight.scale.shape
    return (out * weight.scale.reshape(*batch, *(1,) * (out.ndim - len(batch) - 1), outputs)).astype(result)


def matrix(weight: jax.Array | FP8Tensor, inputs: int) -> jax.Array | FP8Tensor:
    """``weight[*outputs, *inputs]``, of which the last ``inputs`` axes are inputs, as ``[outputs, inputs]``."""
    if isinstance(weight, FP8Tensor):
        outputs = weight.scale.size
        return replace(weight, values=weight.values.reshape(outputs, -1), scale=weight.scale.reshape(outputs))
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
