"""Portable XLA form of paged attention: flash-style over chunks of pages, with a run-time number of chunks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_kernels.attention.storage import map_blocks, read_pages

QUERY_BLOCK = 128  # tokens; scores of one block and one chunk stay in cache
CHUNK_PAGES = 4
DECODE_CHUNK_PAGES = 8  # one query row has few scores: longer chunks amortise the loop

_MASKED = -1e30  # finite, so that a fully masked chunk leaves exp(0) * 0 and not NaN


def paged_attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
                    start: jax.Array, length: jax.Array) -> jax.Array:
    """See ``api.paged_attention``. Future chunks are skipped."""
    tokens = q.shape[1]
    block = min(tokens, QUERY_BLOCK)
    if tokens % block:
        raise ValueError(f"{tokens} query tokens are not a multiple of {block}")
    if tokens == block:
        return _query_block(q, 0, k_pages, v_pages, page_table, start, length)
    blocks = q.reshape(q.shape[0], tokens // block, block, *q.shape[2:]).swapaxes(0, 1)

    def one(index, q_block):
        return _query_block(q_block, index * block, k_pages, v_pages, page_table, start, length)

    out = map_blocks(one, blocks)
    return out.swapaxes(0, 1).reshape(q.shape)


def _query_block(q: jax.Array, offset, k_pages, v_pages, page_table, start, length) -> jax.Array:
    """Attention of one block of queries that begins ``offset`` tokens after each row's start."""
    tokens, page = q.shape[1], k_pages.shape[2]
    pages = min(DECODE_CHUNK_PAGES if tokens == 1 else CHUNK_PAGES, page_table.shape[1])
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))

    def pages_of(chunk):
        ids = jax.lax.dynamic_slice_in_dim(page_table, chunk * pages, pages, axis=1)
        return ids[:, None], (chunk * pages + jnp.arange(pages))[None, None]

    first, span = start + offset, pages * page
    last = jnp.max(jnp.minimum(length, first + tokens))
    plain = jnp.where(first < length, (first + 1) // span, page_table.shape[1])
    return attend_pages(q, first, length, k_pages, v_pages, pages_of, (last + span - 1) // span, jnp.min(plain))


def attend_pages(q: jax.Array, start: jax.Array, length: jax.Array, k_pages: jax.Array, v_pages: jax.Array,
                 pages_of: Callable, chunks: jax.Array, plain: jax.Array,
                 heads: jax.Array | None = None) -> jax.Array:
    """Causal attention of queries to chunks of pages. Online softmax (https://arxiv.org/abs/2205.14135).

    Args:
      q: ``[B, T, K, G, H]``; query t of row b stands at position ``start[b] + t``.
      length: i32 ``[B]``, number of valid positions.
      pages_of: of chunk i, ``(ids, places)``, each i32 ``[B or 1, K or 1, C]``: which pages, and the index that each
        has in its row. A place beyond the row's length hides its page.
      chunks: how many there are, known at run time.
      plain: how many chunks come first of which every query of a row sees every key, unless none of the row's is real.
      heads: i32 ``[K]``, the pages' heads that q's are; by default the same.

    Returns: ``[B, T, K, G, H]``; zero for a row without real queries.
    """
    rows, tokens, kv_heads, group, dim = q.shape
    page = k_pages.shape[2]
    wide = _compute_dtype(q.dtype)
    scaled = (q.astype(jnp.float32) * dim**-0.5).astype(wide)
    q_bkmh = scaled.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * tokens, dim)
    positions = start[:, None] + jnp.tile(jnp.arange(tokens), group)[None]  # [B, G * T]
    heads = (jnp.arange(kv_heads) if heads is None else heads)[:, None]

    def gather(pages, ids, places):
        """Pages as ``[B, K, span, H]``."""
        return read_pages(pages, ids, heads, places).reshape(rows, kv_heads, -1, dim)

    def step(index, carry, masked: bool):
        top, total, out = carry
        ids, places = pages_of(index)
        ids = jnp.broadcast_to(ids, (rows, kv_heads, ids.shape[-1]))
        scores = jnp.einsum("bkmh,bksh->bkms", q_bkmh, gather(k_pages, ids, places).astype(wide),
                            preferred_element_type=jnp.float32)
        values = gather(v_pages, ids, places)
        if masked:
            keys = (places[..., None] * page + jnp.arange(page)).reshape(*places.shape[:2], -1)  # as `ids`, and span
            written = keys < length[:, None, None]
            visible = (keys[:, :, None] <= positions[:, None, :, None]) & written[:, :, None]
            scores = jnp.where(visible, scores, _MASKED)
            # Slots beyond a row's length may hold anything: a zero weight must silence even a NaN.
            values = jnp.where(written[..., None], values, 0)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        if masked:
            weights = jnp.where(visible, weights, 0)
        decay = jnp.exp(top - new_top)
        total = total * decay + weights.sum(axis=-1)
        added = jnp.einsum("bkms,bksh->bkmh", weights.astype(wide), values.astype(wide),
                           preferred_element_type=jnp.float32)
        return new_top, total, out * decay[..., None] + added

    shape = (rows, kv_heads, group * tokens)
    initial = (jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32),
               jnp.zeros((*shape, dim), jnp.float32))
    # The mask takes a third of a prefill's time on CPU, and most chunks need none. In decode a loop is enough.
    carry, done = initial, 0
    if tokens > 1:
        done = jnp.minimum(plain, chunks)
        carry = jax.lax.fori_loop(0, done, lambda index, carry: step(index, carry, masked=False), carry)
    _, total, out = jax.lax.fori_loop(done, chunks, lambda index, carry: step(index, carry, masked=True), carry)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    out = jnp.where((start < length)[:, None, None, None], out, 0)
    out = out.reshape(rows, kv_heads, group, tokens, dim).transpose(0, 3, 1, 2, 4)
    return out.astype(q.dtype)


def _compute_dtype(dtype) -> jnp.dtype:
    """XLA:CPU has no batched bf16 product worth having: there the chunk is widened first."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)
