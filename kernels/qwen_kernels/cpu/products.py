"""Products of activations with int8 matrices on CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.cpu.build import int8_targets

MOST_ROWS = 64  # the kernel's: for more, widening the matrix once costs less


def int8_product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply ``x[..., I]`` by an int8 matrix ``values[O, I]`` with a scale for each output; f32 ``[..., O]``.

    With a further axis in front of all three, there is a matrix for each index: ``values[G, O, I]``.

    A few rows on a CPU go through a kernel that reads the matrices as they are, and are not rounded. Otherwise XLA
    widens the matrices to the type of ``x``, which holds their integers exactly.
    """
    groups = values.shape[:-2] or (1,)
    rows = x.reshape(*groups, -1, x.shape[-1])
    operands = rows, values.reshape(*groups, *values.shape[-2:]), scale.reshape(*groups, -1)

    def widened(rows, values, scale):
        return jnp.einsum("gmi,goi->gmo", rows, values.astype(rows.dtype), preferred_element_type=jnp.float32
                          ) * scale[:, None]

    def kernel(rows, values, scale):
        if (targets := int8_targets()) is None:
            return widened(rows, values, scale)
        as_they_are = rows.dtype == jnp.bfloat16 and targets.bfloats
        shape = jax.ShapeDtypeStruct((*rows.shape[:2], values.shape[1]), jnp.float32)
        call = jax.ffi.ffi_call(targets.bfloats if as_they_are else targets.floats, shape, vmap_method="sequential")
        return call(rows if as_they_are else rows.astype(jnp.float32), values, scale)

    if rows.shape[1] <= MOST_ROWS:
        result = jax.lax.platform_dependent(*operands, cpu=kernel, default=widened)
    else:
        result = widened(*operands)
    return result.reshape(*x.shape[:-1], -1)
