"""Sparse attention over paged keys and values: validation and dispatch.

Axes: B rows, T query tokens, Q blocks of queries, K KV heads, G query heads per KV head, H head dim, P pages, N pages
of one row, M pages of one selection.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.attention.api import check_pages, implementation_named
from qwen_kernels.page import PAGE
from qwen_kernels.sparse_attention import reference, xla
from qwen_kernels.sparse_attention.selection import Selection, Sparsity, query_block, select


def sparse_attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, summaries: jax.Array, page_table: jax.Array,
                     start: jax.Array, length: jax.Array, prompt_length: jax.Array, *, sparsity: Sparsity,
                     implementation: str | None = None) -> tuple[jax.Array, Selection]:
    """Compute causal attention of new tokens to the pages of a paged cache that matter to them.

    The pages hold the new tokens already, and ``summaries`` know them (``update_summaries``). Within a selected page
    attention is exact. All query heads of a KV head, and in a prefill all queries of a page, share a selection.

    Args:
      q: ``[B, T, K, G, H]``; query t of row b stands at position ``start[b] + t``. Where T is a multiple of ``PAGE``,
        ``start`` is too.
      k_pages, v_pages: ``[P, K, PAGE, H]`` in ``page_dtype(q.dtype)``.
      summaries: ``[P, K, nodes, 2, H]``, made by ``new_summaries`` for rows of N pages.
      page_table: i32 ``[B, N]``; entry n holds positions ``n * PAGE`` to ``n * PAGE + PAGE - 1`` of its row.
      start, length: i32 ``[B]``, position of the first query and number of valid positions; length 0 makes a padding
        row, whose output is zero.
      prompt_length: i32 ``[B]``; queries in a block with any of the last ``sparsity.dense_tail`` positions before it
        attend to everything.
      implementation: "xla" or "reference"; None takes the fastest available.

    Returns: ``[B, T, K, G, H]`` in q's dtype, and the selection.
    """
    check_pages(q, k_pages, v_pages)
    selection = select(q, k_pages, summaries, page_table, start=start, length=length, prompt_length=prompt_length,
                       sparsity=sparsity)
    out = attend(q, k_pages, v_pages, page_table, start=start, length=length, selection=selection,
                 dense_heads=sparsity.dense_heads, implementation=implementation)
    return out, selection


def attend(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, selection: Selection, *, dense_heads: tuple[int, ...] = (),
           implementation: str | None = None) -> jax.Array:
    """Compute exact causal attention to the pages of ``selection``; other arguments as in ``sparse_attention``.

    dense_heads: KV heads known to be dense in all blocks, which changes the order of work and not the result.
    """
    check_pages(q, k_pages, v_pages)
    if selection.count.shape[1] != q.shape[1] // query_block(q.shape[1], PAGE):
        raise ValueError(f"a selection of {selection.count.shape[1]} blocks does not fit {q.shape[1]} queries")
    module = implementation_named(implementation, xla=xla, reference=reference)
    return module.attend(q, k_pages, v_pages, page_table, start=start, length=length, selection=selection,
                         dense_heads=dense_heads)


def visible_pages(tokens: int, start: jax.Array, length: jax.Array) -> jax.Array:
    """Return the number of pages that full attention would read for ``tokens`` queries, i32 ``[B]``.

    Pages are counted once for each block of queries (see `query_block`).
    """
    size = query_block(tokens, PAGE)
    first = start[:, None] + jnp.arange(0, tokens, size)
    return jnp.sum(jnp.where(first < length[:, None], first // PAGE + 1, 0), axis=1)
