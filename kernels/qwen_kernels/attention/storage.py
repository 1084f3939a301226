"""How a page holds its elements.

XLA:CPU has no bf16 scatter, and it hoists the widening of a bf16 gather out of the loop around it: either way it
converts the whole cache to float32 at every step (measured: 2 x the cache in temporaries, 5 x the time). There, bf16
pages hold raw 16-bit patterns; everywhere else they hold the elements themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_kernels.attention.eight_bit import EightBitPages


def page_dtype(dtype) -> jnp.dtype:
    """The dtype of the array that stores ``dtype`` elements on the default backend."""
    if jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def to_storage(values: jax.Array, stored) -> jax.Array:
    """``values`` as a page of dtype ``stored`` keeps them."""
    if stored == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(stored)


def from_storage(stored: jax.Array) -> jax.Array:
    """The elements that ``to_storage`` kept."""
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored


def read_pages(pages: jax.Array | EightBitPages, ids: jax.Array, heads: jax.Array, places: jax.Array) -> jax.Array:
    """The elements of heads i32 ``[K, 1]`` of pages i32 ``[..., K or 1, C]``, ``[..., K, C, PAGE, H]``.

    places: like ``ids``, where in their rows the pages stand.
    """
    if isinstance(pages, EightBitPages):
        return pages.read(ids, heads, places)
    return from_storage(pages[ids, heads])


def read_rows(pages: jax.Array | EightBitPages, page_table: jax.Array) -> jax.Array:
    """Every element of the rows of ``page_table[B, N]``, ``[B, N * PAGE, K, H]``."""
    places = jnp.arange(page_table.shape[1])[None, None]
    chosen = read_pages(pages, page_table[:, None], jnp.arange(pages.shape[1])[:, None], places)
    return chosen.reshape(*chosen.shape[:2], -1, chosen.shape[-1]).swapaxes(1, 2)


def map_blocks(one: Callable, blocks: jax.Array, *others: Any) -> jax.Array:
    """``blocks[n, ...]`` with every one of them replaced by ``one(index, block, *others[index])``, which has its shape.

    In place, because for each of a program's ``jax.lax.map`` XLA:CPU holds an empty result from the beginning. And as
    pages are stored: it would widen a whole bf16 array, and narrow it again, for every block.
    """
    stored = page_dtype(blocks.dtype)

    def step(index, held):
        out = one(index, from_storage(held[index]), *jax.tree.map(lambda x: x[index], others))
        return held.at[index].set(to_storage(out, stored))

    return from_storage(jax.lax.fori_loop(0, len(blocks), step, to_storage(blocks, stored)))
