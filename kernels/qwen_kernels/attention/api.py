"""Dense causal attention and attention over paged keys and values: validation and dispatch.

Axes: B rows, T query tokens, K KV heads, G query heads per KV head, H head dim, P pages, N pages of one row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from qwen_kernels.attention import reference, xla, xla_dense
from qwen_kernels.attention.eight_bit import EightBitPages
from qwen_kernels.attention.storage import page_dtype, to_storage

PAGE = 64


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None = None,
                     shared_segment: int | None = None, implementation: str | None = None) -> jax.Array:
    """Causal grouped-query attention, differentiable. Scale is ``H ** -0.5``.

    ``q[B, T, K, G, H]`` and ``k, v[B, T, K, H]`` give q's shape and dtype.

    ``segment_ids[B, T]`` confines a token to its own segment; tokens of ``shared_segment``, if any, are seen by all
    segments that follow (many continuations of one context in one row). implementation: "xla" or "reference".
    """
    if implementation not in (None, "xla", "reference"):
        raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
    chosen = reference if implementation == "reference" else xla_dense
    return chosen.causal_attention(q, k, v, segment_ids=segment_ids, shared_segment=shared_segment)


def paged_attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
                    start: jax.Array, length: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Causal attention of new tokens over a paged cache that already holds them.

    Args:
      q: ``[B, T, K, G, H]``; query t of row b stands at position ``start[b] + t``.
      k_pages, v_pages: ``[P, K, PAGE, H]`` in ``page_dtype(q.dtype)``, or `EightBitPages`.
      page_table: int32 ``[B, N]``; entry n holds positions ``n * PAGE`` to ``n * PAGE + PAGE - 1`` of its row.
      start: int32 ``[B]``, position of each row's first query.
      length: int32 ``[B]``, number of valid positions; 0 makes a padding row, whose output is zero.
      implementation: "xla" or "reference"; None takes the fastest available.

    Returns: ``[B, T, K, G, H]`` in q's dtype. Cost follows ``max(length)``, not the table's width. Queries at or
    beyond ``length`` are padding: their output is finite and meaningless.
    """
    check_pages(q, k_pages, v_pages, page_table, length)
    if implementation not in (None, "xla", "reference"):
        raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
    chosen = reference if implementation == "reference" else xla
    return chosen.paged_attention(q, k_pages, v_pages, page_table, start, length)


def check_pages(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
                length: jax.Array) -> None:
    """ValueError for pages that do not hold the keys and values of ``q[B, T, K, G, H]``.

    A table that names pages that do not exist is found in a function transformed by ``checkify.checkify``; elsewhere
    it costs nothing and gives some other page's contents.
    """
    if k_pages.shape != v_pages.shape or k_pages.shape[2] != PAGE:
        raise ValueError(f"pages must be [P, K, {PAGE}, H]; got {k_pages.shape} and {v_pages.shape}")
    if q.shape[2] != k_pages.shape[1] or q.shape[4] != k_pages.shape[3]:
        raise ValueError(f"q {q.shape} does not match pages {k_pages.shape}")
    if not isinstance(k_pages, EightBitPages) and k_pages.dtype != page_dtype(q.dtype):
        raise ValueError(f"pages of {k_pages.dtype} do not hold {q.dtype}; make them with page_dtype({q.dtype})")
    used = jnp.arange(page_table.shape[1]) * PAGE < length[:, None]
    known = (page_table > 0) & (page_table < len(k_pages))
    checkify.debug_check(jnp.all(length <= page_table.shape[1] * PAGE), "a row of {most} tokens exceeds its page table",
                         most=jnp.max(length))
    checkify.debug_check(jnp.all(known | ~used), "a page table names a page outside 1 .. {last}",
                         last=jnp.asarray(len(k_pages) - 1))


def write_pages(pages: jax.Array | EightBitPages, values: jax.Array, page_table: jax.Array, start: jax.Array,
                length: jax.Array) -> jax.Array | EightBitPages:
    """Store ``values[B, T, K, H]`` at positions ``start[b] + t`` of ``pages[P, K, PAGE, H]``; donate ``pages``.

    8-bit pages take values without the bias that they add. Tokens at or beyond ``length[b]`` are padding and go to page
    0, which no row owns.
    """
    positions = start[:, None] + jnp.arange(values.shape[1])
    page = jnp.take_along_axis(page_table, jnp.minimum(positions // PAGE, page_table.shape[1] - 1), axis=1)
    page = jnp.where(positions < length[:, None], page, 0)
    if isinstance(pages, EightBitPages):
        stored = pages.stored.at[page, :, positions % PAGE].set(pages.encode(values))
        return EightBitPages(stored, pages.form)
    return pages.at[page, :, positions % PAGE].set(to_storage(values, pages.dtype))
