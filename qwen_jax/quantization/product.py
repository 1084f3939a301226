"""Products of activations with weights, plain or quantised, and their derivatives.

With int8 and int4 weights only the weights are rounded. With e4m3 both operands are, each vector that is contracted
with a scale from its own largest value, and the scales are applied to the result, so that the product itself is one of
two 8-bit operands, which hardware has. Values and weights are e4m3, gradients e5m2, which has more range and less
precision (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from qwen_kernels.cpu import int4_product, int8_product

from qwen_jax.quantization.quantized_tensor import E4M3, INT4, INT8, QuantizedTensor, TrainedInFP8, round_with_scale

E5M2 = jnp.dtype(jnp.float8_e5m2)


def product(spec: str, x: jax.Array, weight: jax.Array | QuantizedTensor | TrainedInFP8, result=None) -> jax.Array:
    """Compute the einsum ``spec`` of ``x`` and a weight of any kind, accumulated in float32 and rounded once.

    The result has the dtype ``result``, by default that of ``x``. The weight's output axes come first in its part of
    ``spec`` and last in the result's. A quantised weight has no gradient. With int8 and int4 ``x`` is taken as it is;
    with e4m3 it is rounded to e4m3 as well (unless the weight is `wide`), and in the backward pass the result's
    gradient to e5m2. `TrainedInFP8` rounds both operands of all three products: forward, and for the gradients of ``x``
    and of the weight.
    """
    result = result or x.dtype
    if isinstance(weight, QuantizedTensor):
        return _frozen(spec, x, weight).astype(result)
    if isinstance(weight, TrainedInFP8):
        return _trained(spec, x, weight.value).astype(result)
    return jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32).astype(result)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(spec: str, x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """Compute the einsum of ``x`` and a quantised weight, which gets no gradient; the result is float32."""
    if weight.dtype in (INT8, INT4):
        return _integers(spec, x, weight)
    if weight.wide:
        out = jnp.einsum(spec, x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
    else:
        out = _multiply(spec, _rounded(spec, 0, x), (weight.values, None))
    return out * _scale_of_outputs(spec, weight)


def _frozen_forward(spec, x, weight):
    return _frozen(spec, x, weight), (weight, jnp.zeros((), x.dtype))  # a zero that keeps x's dtype


def _frozen_backward(spec, residuals, gradient):
    weight, zero = residuals
    if weight.dtype == INT4:
        values = weight.dequantize(zero.dtype)
    else:
        values, gradient = weight.values, gradient * _scale_of_outputs(spec, weight)
    spec = _swapped(spec, 0)
    if weight.wide or weight.dtype in (INT8, INT4):
        x_gradient = jnp.einsum(spec, gradient.astype(zero.dtype), values.astype(zero.dtype),
                                preferred_element_type=jnp.float32)
    else:
        x_gradient = _multiply(spec, _rounded(spec, 0, gradient, E5M2), (values, None))
    return x_gradient.astype(zero.dtype), jax.tree.map(jnp.zeros_like, weight)


def _integers(spec: str, x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """Compute the einsum of ``x`` and an int8 or int4 weight; the result is float32.

    The operands share the last axis, which is contracted, and the first one or none.
    """
    first, second = spec.split("->")[0].split(",")
    if (first[0] == second[0]) != (weight.values.ndim == 3):
        raise NotImplementedError(f"the product {spec} with integer weights")
    return (int4_product if weight.dtype == INT4 else int8_product)(x, weight.values, weight.scale)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute the einsum of ``x`` and a weight, both rounded to 8 bits; the result is float32."""
    return _multiply(spec, _rounded(spec, 0, x), _rounded(spec, 1, weight))


def _trained_forward(spec, x, weight):
    return _trained(spec, x, weight), (x, weight)


def _trained_backward(spec, residuals, gradient):
    gradients = []
    for operand, other in enumerate(reversed(residuals)):
        backward = _swapped(spec, operand)
        result = _multiply(backward, _rounded(backward, 0, gradient, E5M2), _rounded(backward, 1, other))
        gradients.append(result.astype(residuals[operand].dtype))
    return tuple(gradients)


_frozen.defvjp(_frozen_forward, _frozen_backward)
_trained.defvjp(_trained_forward, _trained_backward)

Rounded = tuple[jax.Array, jax.Array | None]  # 8-bit values, and scales with axes of size 1 where they are contracted


def _rounded(spec: str, operand: int, x: jax.Array, dtype=E4M3) -> Rounded:
    """Round an operand of the einsum ``spec`` to 8 bits, with a scale for each vector that is contracted.

    operand: its index in ``spec``, 0 or 1.
    """
    axes, out = spec.split("->")[0].split(",")[operand], spec.split("->")[1]
    return round_with_scale(x, tuple(index for index, axis in enumerate(axes) if axis not in out), dtype)


def multiplies_fp8() -> bool:
    """Return whether the default backend multiplies 8-bit floats: GPUs from compute capability 8.9 (Ada, Hopper)."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return jax.default_backend() == "gpu" and tuple(map(int, str(capability).split("."))) >= (8, 9)


def _multiply(spec: str, a: Rounded, b: Rounded) -> jax.Array:
    """Multiply two 8-bit operands as the einsum ``spec``, accumulating in float32, and apply their scales.

    A missing scale is 1.
    """
    # Where nothing multiplies 8-bit floats, bfloat16 holds the same numbers.
    native = multiplies_fp8()
    values = (x if native else x.astype(jnp.bfloat16) for x, _ in (a, b))
    out = jnp.einsum(spec, *values, preferred_element_type=jnp.float32)
    operands, result = spec.split("->")
    for axes, (_, scale) in zip(operands.split(","), (a, b), strict=True):
        if scale is not None:
            out *= _spread(scale.reshape([n for n, axis in zip(scale.shape, axes, strict=True) if axis in result]),
                           [axis for axis in axes if axis in result], result)
    return out


def _scale_of_outputs(spec: str, weight: QuantizedTensor) -> jax.Array:
    """Return the weight's scales, shaped to broadcast against the result of the einsum ``spec``."""
    axes, result = spec.split(",")[1].split("->")
    return _spread(weight.scale, [axis for axis in axes if axis in result], result)


def _spread(x: jax.Array, axes: list[str], result: str) -> jax.Array:
    """Insert axes of size 1 in ``x``, which has ``axes`` of an einsum's ``result``, so that both broadcast."""
    return jnp.expand_dims(x, tuple(index for index, axis in enumerate(result) if axis not in axes))


def _swapped(spec: str, operand: int) -> str:
    """Return the einsum that computes an operand's gradient from the result's gradient and the other operand."""
    operands, result = spec.split("->")
    operands = operands.split(",")
    return f"{result},{operands[1 - operand]}->{operands[operand]}"
