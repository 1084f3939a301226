"""Products of activations with int8 and int4 matrices on CPUs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_kernels.cpu.build import Targets, product_targets

MOST_ROWS = 64  # the kernels': for more, widening the matrix once costs less
GROUP = 32  # inputs of an output that share a scale, in int4


def int8_product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply ``x[..., I]`` by an int8 matrix ``values[O, I]`` with a scale for each output; f32 ``[..., O]``.

    With a further axis in front of all three, there is a matrix for each index: ``values[G, O, I]``.

    A few rows on a CPU go through a kernel that reads the matrices as they are, and are not rounded. Otherwise XLA
    widens the matrices to the type of ``x``, which holds their integers exactly, or to float32 on a processor that has
    no products of bfloat16.
    """
    def widened(rows, values, scale):
        return jnp.einsum("gmi,goi->gmo", rows, values.astype(rows.dtype), preferred_element_type=jnp.float32
                          ) * scale[:, None]

    scale = scale.reshape(-1, scale.shape[-1])
    return _product(x, values, scale, widened, lambda targets: targets.int8)


def int4_product(x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply ``x[..., I]`` by an int4 matrix, `pack_int4` of ``[O, I]``, with a scale for each `GROUP`.

    packed: uint8 ``[O, I / 2]``. scale: bfloat16 ``[O, I / GROUP]``. Returns f32 ``[..., O]``. Otherwise as
    `int8_product`; where XLA widens the matrices, the products of integers and scales are rounded to the type of ``x``.
    """
    def widened(rows, packed, scale):
        return jnp.einsum("gmi,goi->gmo", rows, dequantize_int4(packed, scale).astype(rows.dtype),
                          preferred_element_type=jnp.float32)

    scale = scale.reshape(-1, *scale.shape[-2:])
    return _product(x, packed, scale, widened, lambda targets: targets.int4)


def pack_int4(integers: jax.Array) -> jax.Array:
    """Pack integers from -8 to 7, ``[..., I]``, in half as many bytes: uint8 ``[..., I / 2]``.

    The first half of each `GROUP` is in the low bits of its bytes, the second half in the high ones; each plus 8.
    """
    halves = (integers + 8).astype(jnp.uint8).reshape(*integers.shape[:-1], -1, 2, GROUP // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*integers.shape[:-1], -1)


def dequantize_int4(packed: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the numbers f32 ``[..., I]`` that ``packed[..., I / 2]`` and ``scale[..., I / GROUP]`` stand for."""
    groups = packed.reshape(*scale.shape, GROUP // 2)
    integers = jnp.concatenate([groups & 15, groups >> 4], axis=-1).astype(jnp.float32) - 8
    return (integers * scale[..., None].astype(jnp.float32)).reshape(*packed.shape[:-1], -1)


def _product(x: jax.Array, values: jax.Array, scale: jax.Array, widened: Callable,
             names: Callable[[Targets], tuple[str, str | None]]) -> jax.Array:
    """Multiply ``x[..., I]`` by the matrix or matrices ``values``, by a kernel on CPUs or by ``widened``.

    names: function of the kernels' names that returns those of float32 and of bfloat16 rows.
    """
    groups = values.shape[:-2] or (1,)
    rows = x.reshape(*groups, -1, x.shape[-1])
    operands = rows, values.reshape(*groups, *values.shape[-2:]), scale

    def kernel(rows, values, scale):
        if (targets := product_targets()) is None:
            return widened(rows, values, scale)
        floats, bfloats = names(targets)
        as_they_are = rows.dtype == jnp.bfloat16 and bfloats
        shape = jax.ShapeDtypeStruct((*rows.shape[:2], values.shape[1]), jnp.float32)
        call = jax.ffi.ffi_call(bfloats if as_they_are else floats, shape, vmap_method="sequential")
        return call(rows if as_they_are else rows.astype(jnp.float32), values, scale)

    def in_float32(rows, values, scale):
        """XLA:CPU emulates products of bfloat16 where the processor has none, in half as much time again."""
        emulated = (targets := product_targets()) is not None and targets.int8[1] is None
        return widened(rows.astype(jnp.float32) if emulated else rows, values, scale)

    few = rows.shape[1] <= MOST_ROWS
    result = jax.lax.platform_dependent(*operands, cpu=kernel if few else in_float32, default=widened)
    return result.reshape(*x.shape[:-1], -1)
