"""Portable XLA form of attention to selected pages: gathers them, a few at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwen_kernels.attention.storage import map_blocks
from qwen_kernels.attention.xla import attend_pages, chunk_pages
from qwen_kernels.sparse_attention.selection import HIDDEN, Selection


def attend(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, selection: Selection, dense_heads: tuple[int, ...] = ()) -> jax.Array:
    """Compute attention to the selected pages, as ``api.attend`` describes, a few pages at a time.

    KV heads of ``dense_heads`` run apart: the others would wait for their many pages.
    """
    run = partial(_attend_heads, k_pages=k_pages, v_pages=v_pages, page_table=page_table, start=start, length=length)
    if not dense_heads:
        return run(q, selection=selection, heads=np.arange(q.shape[2]))
    parts = [np.array(dense_heads), np.setdiff1d(np.arange(q.shape[2]), dense_heads)]
    parts = [heads for heads in parts if len(heads)]
    out = [run(q[:, :, heads], selection=jax.tree.map(lambda x, heads=heads: x[:, :, heads], selection), heads=heads)
           for heads in parts]
    return jnp.concatenate(out, axis=2)[:, :, np.argsort(np.concatenate(parts))]


def _attend_heads(q, *, k_pages, v_pages, page_table, start, length, selection: Selection, heads) -> jax.Array:
    """Compute attention of the queries ``q[B, T, K, G, H]`` of KV heads ``heads`` to the pages selected for them."""
    rows, tokens = q.shape[:2]
    size = tokens // selection.count.shape[1]
    blocks = q.reshape(rows, -1, size, *q.shape[2:]).swapaxes(0, 1)
    pages = min(chunk_pages(blocks[0], k_pages.shape[2]), selection.places.shape[-1])
    padding = -selection.places.shape[-1] % pages
    listed = jnp.pad(selection.places, ((0, 0),) * 3 + ((0, padding),), constant_values=HIDDEN)

    def attend_block(index, queries, selected):
        listed, count, dense = selected

        def pages_of(chunk):
            inside = chunk * pages + jnp.arange(pages)
            ranked = jax.lax.dynamic_slice_in_dim(listed, chunk * pages, pages, axis=-1)  # past the end: unused
            places = jnp.where(dense[..., None], inside, ranked)
            places = jnp.where(inside < count[..., None], places, HIDDEN)
            within = jnp.minimum(places, page_table.shape[1] - 1)
            ids = jnp.take_along_axis(page_table, within.reshape(rows, -1), axis=1).reshape(within.shape)
            return jnp.where(places < HIDDEN, ids, 0), places

        chunks = (jnp.max(count) + pages - 1) // pages
        unmasked = jnp.min(jnp.where(count > 0, (count - 1) // pages, chunks))  # the last page is the queries' own
        return attend_pages(queries, start + index * size, length, k_pages, v_pages, pages_of=pages_of, chunks=chunks,
                            unmasked=unmasked, heads=heads)

    selected = jax.tree.map(lambda x: x.swapaxes(0, 1), (listed, selection.count, selection.dense))
    if len(blocks) == 1:
        return attend_block(0, blocks[0], jax.tree.map(lambda x: x[0], selected))
    out = map_blocks(attend_block, blocks, selected)
    return out.swapaxes(0, 1).reshape(q.shape)
