"""Part of an attention score that comes from the key's bias, which 8-bit pages leave out.

It is the product of a query with the bias. Per RoPE plane it is ``a cos t + b sin t``, with t the plane's angle at the
key and a, b made of query and bias. So it is a second small product: of coefficients with cosines and sines.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.attention.eight_bit import PageFormat
from qwen_kernels.page import PAGE


def bias_coefficients(q: jax.Array, page_format: PageFormat) -> tuple[jax.Array, jax.Array]:
    """Return coefficients of the cosines and sines of a key's angles in a query's product with the key's bias.

    Both are f32 ``[..., K, G, H / 2]``.

    With u, w the bias's two channels of a plane, and x, y the query's: the bias at angle t is (u cos t - w sin t,
    w cos t + u sin t), and its product with the query is (x u + y w) cos t + (y u - x w) sin t.
    """
    x, y = jnp.split(q, 2, axis=-1)
    u, w = jnp.split(page_format.bias[:, None] * page_format.magnitude, 2, axis=-1)
    return x * u + y * w, y * u - x * w


def page_angles(page_format: PageFormat, pages: int) -> tuple[jax.Array, jax.Array]:
    """Return the angles f32 by which RoPE rotates to the beginning of each page, and from there to each of its keys.

    Shapes ``[pages, H / 2]`` and ``[PAGE, H / 2]``.
    """
    begin = jnp.arange(pages, dtype=jnp.float32)[:, None] * PAGE * page_format.frequencies
    return begin, jnp.arange(PAGE, dtype=jnp.float32)[:, None] * page_format.frequencies


def divided_by_largest(x: jax.Array, axis) -> tuple[jax.Array, jax.Array]:
    """Return ``x`` divided by its largest absolute value along ``axis``, and that value without the axis.

    The quotient fits float16 for every ``x``. An ``x`` of zeros is divided by 1.
    """
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1.0)
    return x / largest, jnp.squeeze(largest, axis)
