"""Portable XLA form: gathers the selected pages, a few at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qwen_kernels.attention.storage import map_blocks
from qwen_kernels.attention.xla import CHUNK_PAGES, DECODE_CHUNK_PAGES, attend_pages
from qwen_kernels.sparse_attention.selection import HIDDEN, Selection


def attend(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, selection: Selection, dense_heads: tuple[int, ...] = ()) -> jax.Array:
    """See ``api.attend``. The heads of ``dense_heads`` go apart: the others would wait for their many pages."""
    if not dense_heads:
        return _attend(q, k_pages, v_pages, page_table, start, length, selection, np.arange(q.shape[2]))
    parts = [np.array(dense_heads), np.setdiff1d(np.arange(q.shape[2]), dense_heads)]
    parts = [heads for heads in parts if len(heads)]
    out = [_attend(q[:, :, heads], k_pages, v_pages, page_table, start, length,
                   jax.tree.map(lambda x, heads=heads: x[:, :, heads], selection), heads) for heads in parts]
    return jnp.concatenate(out, axis=2)[:, :, np.argsort(np.concatenate(parts))]


def _attend(q, k_pages, v_pages, page_table, start, length, selection: Selection, heads) -> jax.Array:
    rows, tokens = q.shape[:2]
    size = tokens // selection.count.shape[1]
    pages = min(DECODE_CHUNK_PAGES if size == 1 else CHUNK_PAGES, selection.places.shape[-1])
    blocks = q.reshape(rows, -1, size, *q.shape[2:]).swapaxes(0, 1)
    padding = -selection.places.shape[-1] % pages
    listed = jnp.pad(selection.places, ((0, 0),) * 3 + ((0, padding),), constant_values=HIDDEN)

    def one(index, queries, chosen):
        listed, count, dense = chosen

        def pages_of(chunk):
            inside = chunk * pages + jnp.arange(pages)
            some = jax.lax.dynamic_slice_in_dim(listed, chunk * pages, pages, axis=-1)  # past the end: unused
            places = jnp.where(dense[..., None], inside, some)
            places = jnp.where(inside < count[..., None], places, HIDDEN)
            within = jnp.minimum(places, page_table.shape[1] - 1)
            ids = jnp.take_along_axis(page_table, within.reshape(rows, -1), axis=1).reshape(within.shape)
            return jnp.where(places < HIDDEN, ids, 0), places

        chunks = (jnp.max(count) + pages - 1) // pages
        plain = jnp.min(jnp.where(count > 0, (count - 1) // pages, chunks))  # the last page is the queries' own
        return attend_pages(queries, start + index * size, length, k_pages, v_pages, pages_of, chunks, plain, heads)

    places = jax.tree.map(lambda x: x.swapaxes(0, 1), (listed, selection.count, selection.dense))
    if len(blocks) == 1:
        return one(0, blocks[0], jax.tree.map(lambda x: x[0], places))
    out = map_blocks(one, blocks, places)
    return out.swapaxes(0, 1).reshape(q.shape)
