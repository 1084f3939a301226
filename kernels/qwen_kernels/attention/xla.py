"""Portable XLA form of paged attention: flash-style over chunks of pages, as many as the longest row needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from qwen_kernels.attention.storage import map_blocks, read_pages

QUERY_BLOCK = 128  # tokens; the scores of a block and a chunk stay in cache
CHUNK_PAGES = 0  # pages of keys in a chunk; 0 leaves it to `chunk_pages`
KEY_BYTES = 1 << 20  # of a decode chunk's keys on a CPU: with more they leave the processor's cache

_MASKED = -1e30  # score of a masked key; finite, so that a fully masked chunk leaves exp(0) * 0 and not NaN


def paged_attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
                    start: jax.Array, length: jax.Array) -> jax.Array:
    """Compute attention over a paged cache, as ``api.paged_attention`` describes, by chunks of pages.

    Chunks after the queries are skipped.
    """
    tokens = q.shape[1]
    size = tokens if tokens <= QUERY_BLOCK else math.gcd(tokens, QUERY_BLOCK)  # an odd number of pages: a page
    attend = partial(_attend_block, k_pages=k_pages, v_pages=v_pages, page_table=page_table, start=start, length=length)
    if tokens == size:
        return attend(q, offset=0)
    blocks = q.reshape(q.shape[0], tokens // size, size, *q.shape[2:]).swapaxes(0, 1)
    out = map_blocks(lambda index, block: attend(block, offset=index * size), blocks)
    return out.swapaxes(0, 1).reshape(q.shape)


def _attend_block(q: jax.Array, *, offset, k_pages, v_pages, page_table, start, length) -> jax.Array:
    """Compute attention for a block of queries whose first is ``offset`` tokens after each row's ``start``."""
    tokens, page = q.shape[1], k_pages.shape[2]
    pages = min(chunk_pages(q, page), page_table.shape[1])
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))

    def pages_of(chunk):
        ids = jax.lax.dynamic_slice_in_dim(page_table, chunk * pages, pages, axis=1)
        return ids[:, None], (chunk * pages + jnp.arange(pages))[None, None]

    first, span = start + offset, pages * page
    last = jnp.max(jnp.minimum(length, first + tokens))
    unmasked = jnp.where(first < length, (first + 1) // span, page_table.shape[1])
    return attend_pages(q, first, length, k_pages, v_pages, pages_of=pages_of, chunks=(last + span - 1) // span,
                        unmasked=jnp.min(unmasked))


def chunk_pages(q: jax.Array, page: int) -> int:
    """Return how many pages of keys are read at a time for a block of queries ``[B, T, K, G, H]``, one block a row.

    Longer chunks amortise the loop. On a CPU, chunks are shorter where many rows together leave its cache: in a decode
    step of 64 rows of the 0.5B shape, a layer's attention takes 1.4 ms by single pages where chunks of eight take 28,
    on short contexts, and 52 where those take 131 on 4,000 tokens. Prefills of eight rows take half as long.

    page: tokens of a page.
    """
    rows, tokens, kv_heads, _, dim = q.shape
    if CHUNK_PAGES:
        return CHUNK_PAGES
    on_cpu = jax.default_backend() == "cpu"
    if tokens == 1:
        return min(4, max(1, KEY_BYTES // (rows * kv_heads * page * dim * 4))) if on_cpu else 8
    return 2 if on_cpu and rows > 1 and tokens > page else 4


def attend_pages(q: jax.Array, start: jax.Array, length: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *,
                 pages_of: Callable, chunks: jax.Array, unmasked: jax.Array,
                 heads: jax.Array | None = None) -> jax.Array:
    """Compute causal attention of queries to chunks of pages, with an online softmax.

    https://arxiv.org/abs/2205.14135

    Args:
      q: ``[B, T, K, G, H]``; query t of row b stands at position ``start[b] + t``.
      length: i32 ``[B]``, number of valid positions.
      pages_of: function from a chunk's index to ``(ids, places)``, each i32 ``[B or 1, K or 1, C]``: page ids, and the
        index of each page in its row. A place beyond the row's length hides its page.
      chunks: number of chunks, known at run time.
      unmasked: number of leading chunks of which all real queries see all keys, so that they need no mask.
      heads: i32 ``[K]``, the pages' KV heads that belong to q's; by default the same.

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
        """Return the keys or values in a chunk's pages, ``[B, K, keys, H]``."""
        return read_pages(pages, ids, heads, places).reshape(rows, kv_heads, -1, dim)

    def step(index, carry, masked: bool):
        ids, places = pages_of(index)
        ids = jnp.broadcast_to(ids, (rows, kv_heads, ids.shape[-1]))
        scores = jnp.einsum("bkmh,bksh->bkms", q_bkmh, gather(k_pages, ids, places).astype(wide),
                            preferred_element_type=jnp.float32)
        values, visible = gather(v_pages, ids, places), None
        if masked:
            keys = (places[..., None] * page + jnp.arange(page)).reshape(*places.shape[:2], -1)  # positions
            written = keys < length[:, None, None]
            visible = (keys[:, :, None] <= positions[:, None, :, None]) & written[:, :, None]
            scores = jnp.where(visible, scores, _MASKED)
            # Positions beyond a row's length may hold anything: a zero weight must silence even a NaN.
            values = jnp.where(written[..., None], values, 0)
        return _add_chunk(carry, scores, values, visible, wide)

    shape = (rows, kv_heads, group * tokens)
    initial = (jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32),
               jnp.zeros((*shape, dim), jnp.float32))
    # The mask takes a third of a prefill's time on CPU, and most chunks need none. In decode a loop is enough.
    carry, done = initial, 0
    if tokens > 1:
        done = jnp.minimum(unmasked, chunks)
        carry = jax.lax.fori_loop(0, done, lambda index, carry: step(index, carry, masked=False), carry)
    _, total, out = jax.lax.fori_loop(done, chunks, lambda index, carry: step(index, carry, masked=True), carry)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    out = jnp.where((start < length)[:, None, None, None], out, 0)
    out = out.reshape(rows, kv_heads, group, tokens, dim).transpose(0, 3, 1, 2, 4)
    return out.astype(q.dtype)


def _add_chunk(carry: tuple, scores: jax.Array, values: jax.Array, visible: jax.Array | None, dtype) -> tuple:
    """Add a chunk's keys and values to the running state of an online softmax, and return the new state.

    carry: largest score, sum of weights and weighted sum of values so far, of each query row. visible: bool, keys
    that a query sees; None for all. dtype: element type of the product of weights and values.
    """
    top, total, out = carry
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    decay = jnp.exp(top - new_top)
    total = total * decay + weights.sum(axis=-1)
    added = jnp.einsum("bkms,bksh->bkmh", weights.astype(dtype), values.astype(dtype),
                       preferred_element_type=jnp.float32)
    return new_top, total, out * decay[..., None] + added


def _compute_dtype(dtype) -> jnp.dtype:
    """Return the dtype in which attention multiplies: float32 on a CPU, which is slow in bf16, else ``dtype``."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)
