"""Portable XLA form of paged attention: flash-style over chunks of pages, with a run-time number of chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.attention.storage import from_storage

QUERY_BLOCK = 128  # tokens; scores of one block and one chunk stay in cache
CHUNK_PAGES = 4
DECODE_CHUNK_PAGES = 8  # one query row has few scores: longer chunks amortise the loop

_MASKED = -1e30  # finite, so that a fully masked chunk leaves exp(0) * 0 and not NaN


def paged_attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
                    start: jax.Array, length: jax.Array) -> jax.Array:
    """See ``api.paged_attention``. Online softmax (https://arxiv.org/abs/2205.14135), future chunks skipped."""
    tokens = q.shape[1]
    block = min(tokens, QUERY_BLOCK)
    if tokens % block:
        raise ValueError(f"{tokens} query tokens are not a multiple of {block}")
    if tokens == block:
        return _query_block(q, 0, k_pages, v_pages, page_table, start, length)
    blocks = q.reshape(q.shape[0], tokens // block, block, *q.shape[2:]).swapaxes(0, 1)

    def one(item):
        index, q_block = item
        return _query_block(q_block, index * block, k_pages, v_pages, page_table, start, length)

    out = jax.lax.map(one, (jnp.arange(tokens // block), blocks))
    return out.swapaxes(0, 1).reshape(q.shape)


def _query_block(q: jax.Array, offset, k_pages, v_pages, page_table, start, length) -> jax.Array:
    """Attention of one block of queries that begins ``offset`` tokens after each row's start."""
    rows, tokens, kv_heads, group, dim = q.shape
    page = k_pages.shape[2]
    pages = min(DECODE_CHUNK_PAGES if tokens == 1 else CHUNK_PAGES, page_table.shape[1])
    span = pages * page
    padding = -page_table.shape[1] % pages
    page_table = jnp.pad(page_table, ((0, 0), (0, padding)))

    wide = _compute_dtype(q.dtype)
    scaled = (q.astype(jnp.float32) * dim**-0.5).astype(wide)
    q_bkmh = scaled.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * tokens, dim)
    positions = start[:, None] + offset + jnp.tile(jnp.arange(tokens), group)[None]  # [B, G * T]

    def gather(array, index):
        """One chunk as ``[B, K, span, H]``."""
        ids = jax.lax.dynamic_slice_in_dim(page_table, index * pages, pages, axis=1)
        chunk = from_storage(array[ids]).swapaxes(1, 2)
        return chunk.reshape(rows, kv_heads, span, dim)

    def step(index, carry):
        top, total, out = carry
        keys = index * span + jnp.arange(span)
        scores = jnp.einsum("bkmh,bksh->bkms", q_bkmh, gather(k_pages, index).astype(wide),
                            preferred_element_type=jnp.float32)
        visible = (keys[None, None] <= positions[..., None]) & (keys[None] < length[:, None])[:, None]
        scores = jnp.where(visible[:, None], scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        weights = jnp.where(visible[:, None], weights, 0)
        decay = jnp.exp(top - new_top)
        total = total * decay + weights.sum(axis=-1)
        # Slots beyond a row's length may hold anything: a zero weight must silence even a NaN.
        values = jnp.where((keys[None] < length[:, None])[:, None, :, None], gather(v_pages, index), 0)
        added = jnp.einsum("bkms,bksh->bkmh", weights.astype(wide), values.astype(wide),
                           preferred_element_type=jnp.float32)
        return new_top, total, out * decay[..., None] + added

    last = jnp.max(jnp.minimum(length, start + offset + tokens))
    chunks = (last + span - 1) // span
    shape = (rows, kv_heads, group * tokens)
    initial = (jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32),
               jnp.zeros((*shape, dim), jnp.float32))
    _, total, out = jax.lax.fori_loop(0, chunks, step, initial)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    out = out.reshape(rows, kv_heads, group, tokens, dim).transpose(0, 3, 1, 2, 4)
    return out.astype(q.dtype)


def _compute_dtype(dtype) -> jnp.dtype:
    """XLA:CPU has no batched bf16 product worth having: there the chunk is widened first."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)
