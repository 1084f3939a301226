"""Products of activations with int8 matrices on CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.cpu.build import int8_target

MOST_ROWS = 64  # the kernel's: for more, widening the matrix once costs less


def int8_product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply ``x[..., I]`` by an int8 matrix ``values[O, I]`` with a scale for each output; f32 ``[..., O]``.

    A few rows on a CPU go through a kernel that reads the matrix as it is, and are not rounded. Otherwise XLA widens
    the matrix to the type of ``x``, which holds its integers exactly.
    """
    rows = x.reshape(-1, x.shape[-1])

    def widened(rows, values, scale):
        return jnp.einsum("mi,oi->mo", rows, values.astype(rows.dtype), preferred_element_type=jnp.float32) * scale

    def kernel(rows, values, scale):
        if (target := int8_target()) is None:
            return widened(rows, values, scale)
        shape = jax.ShapeDtypeStruct((rows.shape[0], values.shape[0]), jnp.float32)
        return jax.ffi.ffi_call(target, shape, vmap_method="sequential")(rows.astype(jnp.float32), values, scale)

    if len(rows) <= MOST_ROWS:
        result = jax.lax.platform_dependent(rows, values, scale, cpu=kernel, default=widened)
    else:
        result = widened(rows, values, scale)
    return result.reshape(*x.shape[:-1], -1)
