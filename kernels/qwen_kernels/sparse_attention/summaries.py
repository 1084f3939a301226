"""Summaries of keys, by which pages are selected: mean and standard deviation of every channel, over several spans.

A page has four leaves of 16 tokens, and is a leaf of a pyramid itself: a node of level l spans 4**l pages of a row. A
node of a level above 0 is kept with its last page, so pages alone decide what is in it: rows that share a prefix share
its nodes, and a node exists once its last page is full.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.attention.storage import from_storage, read_pages, to_storage

LEAF = 16  # tokens
LEAVES = 4  # leaves in a page
RADIX = 4  # nodes of a level in a node of the next
TOP = 64  # largest number of nodes of the highest level, which are all scored


def levels_above_pages(pages: int) -> int:
    """Return the number of levels of a pyramid over ``pages`` pages whose top level has at most ``TOP`` nodes."""
    levels = 0
    while pages // RADIX**levels > TOP:
        levels += 1
    return levels


def nodes_per_page(pages: int) -> int:
    """Return the number of summary nodes stored with each page, for rows of at most ``pages`` pages.

    These are four leaves, the page itself, and a node of each level.
    """
    return LEAVES + 1 + levels_above_pages(pages)


def new_summaries(k_pages: jax.Array, width: int, dtype=None) -> jax.Array:
    """Return empty summaries for ``k_pages[P, K, PAGE, H]``: zeros ``[P, K, nodes, 2, H]``.

    Nodes are in the order leaves, page, levels; the axis of size 2 is mean, standard deviation.

    width: largest number of pages of a row. dtype: stored element type, by default that of the pages; 8-bit pages need
    another.
    """
    pages, heads, _, dim = k_pages.shape
    return jnp.zeros((pages, heads, nodes_per_page(width), 2, dim), dtype or k_pages.dtype)


def update_summaries(summaries: jax.Array, k_pages: jax.Array, page_table: jax.Array, start: jax.Array,
                     length: jax.Array, tokens: int) -> jax.Array:
    """Recompute the summaries of keys at positions ``start`` to ``start + tokens - 1`` of each row.

    The caller should donate ``summaries``.

    The keys are already in their pages. ``start, length``: i32 ``[B]``; positions at or beyond ``length`` are padding.
    ``start`` is the first position of a page unless there are fewer tokens than a page has.
    """
    rows, width = page_table.shape
    page, heads, dim = k_pages.shape[2], *k_pages.shape[1::2]
    touched = -(-tokens // page) + (tokens % page > 1)  # fewer tokens than a page can lie across two
    places = start[:, None] // page + jnp.arange(touched)  # [B, touched]
    ids = _ids(page_table, places, places * page < length[:, None])

    positions = places[..., None] * page + jnp.arange(page)
    known = (positions < length[:, None, None]).reshape((rows, touched, 1, LEAVES, LEAF, 1))
    keys = read_pages(k_pages, ids[:, None], jnp.arange(heads)[:, None], places[:, None]).swapaxes(1, 2)
    keys = keys.reshape((rows, touched, heads, LEAVES, LEAF, dim)).astype(jnp.float32)
    keys = jnp.where(known, keys, 0)
    count = jnp.sum(known, axis=4)
    mean = jnp.sum(keys, axis=4) / jnp.maximum(count, 1)
    squares = jnp.where(known, jnp.square(keys - mean[..., None, :]), 0)
    deviation = jnp.sqrt(jnp.sum(squares, axis=4) / jnp.maximum(count, 1))
    leaves = jnp.stack([mean, deviation], axis=4)  # [B, touched, K, LEAVES, 2, H]
    whole = _join(leaves, count / jnp.maximum(jnp.sum(count, axis=3, keepdims=True), 1))
    nodes = jnp.concatenate([leaves, whole[:, :, :, None]], axis=3)
    summaries = summaries.at[ids, :, : LEAVES + 1].set(to_storage(nodes, summaries.dtype))

    for level in range(1, summaries.shape[2] - LEAVES):
        span = RADIX**level
        ends = (places[:, :1] // span + jnp.arange(touched // span + 1)) * span + span - 1  # last pages of nodes
        done = (ends <= places[:, -1:]) & ((ends + 1) * page <= length[:, None])
        parts = ends[..., None] - jnp.arange(RADIX) * (span // RADIX)
        children = from_storage(summaries[_ids(page_table, parts, done[..., None]), :, LEAVES + level - 1])
        joined = _join(jnp.moveaxis(children, 2, 3), 1 / RADIX)  # [B, nodes, K, 2, H]
        slot = _ids(page_table, ends, done)
        summaries = summaries.at[slot, :, LEAVES + level].set(to_storage(joined, summaries.dtype))
    return summaries


def _join(nodes: jax.Array, shares: jax.Array | float) -> jax.Array:
    """Join the summaries of nodes ``[..., n, 2, H]`` to that of all their keys, ``[..., 2, H]``.

    shares: each node's share of the keys, broadcast to ``[..., n, H]``.

    The variance of all keys is the mean of the nodes' variances and of their means' squared distances from the mean.
    """
    means, deviations = nodes[..., 0, :], nodes[..., 1, :]
    mean = jnp.sum(shares * means, axis=-2, keepdims=True)
    variance = jnp.sum(shares * (jnp.square(deviations) + jnp.square(means - mean)), axis=-2)
    return jnp.stack([mean[..., 0, :], jnp.sqrt(variance)], axis=-2)


def _ids(page_table: jax.Array, places: jax.Array, valid: jax.Array) -> jax.Array:
    """Return page ids of places ``[B, ...]`` in the rows' page tables; page 0, which no row owns, if not ``valid``."""
    flat = jnp.clip(places, 0, page_table.shape[1] - 1).reshape(len(places), -1)
    ids = jnp.take_along_axis(page_table, flat, axis=1).reshape(places.shape)
    return jnp.where(valid, ids, 0)
