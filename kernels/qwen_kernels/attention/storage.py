"""Storage of a page's elements: conversion between elements and the arrays that hold them.

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
    """Return the dtype of pages that hold ``dtype`` elements: uint16 for bfloat16 on a CPU, else ``dtype`` itself."""
    if jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def to_storage(values: jax.Array, stored) -> jax.Array:
    """Convert ``values`` to ``stored``, the dtype of a page: a cast, or bf16 bit patterns if it is uint16."""
    if stored == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(stored)


def from_storage(stored: jax.Array) -> jax.Array:
    """Convert an array in a page's dtype, which `to_storage` made, back to its elements: uint16 to bfloat16."""
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored


def read_pages(pages: jax.Array | EightBitPages, ids: jax.Array, heads: jax.Array, places: jax.Array) -> jax.Array:
    """Gather pages of the cache and return the keys or values that they hold, ``[..., K, C, PAGE, H]``.

    ids: i32 ``[..., K or 1, C]``. heads: i32 ``[K, 1]``, KV heads of the pages. places: like ``ids``, each page's index
    in its row.
    """
    if isinstance(pages, EightBitPages):
        return pages.read(ids, heads, places)
    return from_storage(pages[ids, heads])


def read_rows(pages: jax.Array | EightBitPages, page_table: jax.Array) -> jax.Array:
    """Gather all pages of the rows of ``page_table[B, N]``: return their keys or values ``[B, N * PAGE, K, H]``."""
    places = jnp.arange(page_table.shape[1])[None, None]
    values = read_pages(pages, page_table[:, None], jnp.arange(pages.shape[1])[:, None], places)
    return values.reshape(*values.shape[:2], -1, values.shape[-1]).swapaxes(1, 2)


def map_blocks(function: Callable, blocks: jax.Array, *arguments: Any) -> jax.Array:
    """Return ``blocks[n, ...]`` with each block replaced by ``function(index, block, *arguments[index])``.

    The function keeps a block's shape.

    It works in place, because for each of a program's ``jax.lax.map`` XLA:CPU holds an empty result from the beginning.
    And on stored elements: XLA:CPU would widen a whole bf16 array, and narrow it again, for every block.
    """
    stored = page_dtype(blocks.dtype)

    def step(index, results):
        out = function(index, from_storage(results[index]), *jax.tree.map(lambda x: x[index], arguments))
        return results.at[index].set(to_storage(out, stored))

    return from_storage(jax.lax.fori_loop(0, len(blocks), step, to_storage(blocks, stored)))
