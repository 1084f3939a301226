"""Dense causal attention and attention over paged keys and values: validation and dispatch.

Axes: B rows, T query tokens, K KV heads, G query heads per KV head, H head dim, P pages, N pages of one row.
"""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from qwen_kernels.attention import reference, xla, xla_dense
from qwen_kernels.attention.eight_bit import EightBitPages
from qwen_kernels.attention.storage import page_dtype, to_storage
from qwen_kernels.page import PAGE


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None = None,
                     shared_segment: int | None = None, implementation: str | None = None) -> jax.Array:
    """Compute causal grouped-query attention, differentiable, with scale ``H ** -0.5``.

    Args:
      q, k, v: ``[B, T, K, G, H]``, ``[B, T, K, H]``, ``[B, T, K, H]``.
      segment_ids: i32 ``[B, T]``; a token sees only keys of its own segment.
      shared_segment: segment that the tokens of all segments see too (many continuations of one context in one row).
      implementation: "xla" or "reference"; None takes the fastest available.

    Returns: ``[B, T, K, G, H]`` in q's dtype.
    """
    module = implementation_named(implementation, xla=xla_dense, reference=reference)
    return module.causal_attention(q, k, v, segment_ids=segment_ids, shared_segment=shared_segment)


def paged_attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
                    start: jax.Array, length: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Compute causal attention of new tokens over a paged cache that already holds them.

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
    check_pages(q, k_pages, v_pages)
    module = implementation_named(implementation, xla=xla, reference=reference)
    return module.paged_attention(q, k_pages, v_pages, page_table, start=start, length=length)


def implementation_named(name: str | None, **modules: ModuleType) -> ModuleType:
    """Return the module ``name`` of ``modules``, or the first one for None. Raises ValueError for an unknown name."""
    if name not in (None, *modules):
        raise ValueError(f"implementation must be one of {', '.join(modules)}, or None, not {name!r}")
    return modules[name or next(iter(modules))]


def check_pages(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> None:
    """Raise ValueError if pages do not fit queries ``q[B, T, K, G, H]`` in page size, heads, head dim or dtype.

    A page table that names missing pages is not noticed: attention reads another page. See `check_page_table`.
    """
    if k_pages.shape != v_pages.shape or k_pages.shape[2] != PAGE:
        raise ValueError(f"pages must be [P, K, {PAGE}, H], not {k_pages.shape} and {v_pages.shape}")
    if q.shape[2] != k_pages.shape[1] or q.shape[4] != k_pages.shape[3]:
        raise ValueError(f"q {q.shape} does not match pages {k_pages.shape}")
    if not isinstance(k_pages, EightBitPages) and k_pages.dtype != page_dtype(q.dtype):
        raise ValueError(f"pages of {k_pages.dtype} do not hold {q.dtype}; make them with page_dtype({q.dtype})")


def check_page_table(page_table: jax.Array, length: jax.Array, num_pages: int) -> None:
    """Check that a page table holds each row's ``length[B]`` tokens in pages ``1 .. num_pages - 1``.

    For functions that are transformed by ``checkify.checkify``, whose error it sets. It is not part of the attention
    functions: programs with such checks are called through Python, which takes milliseconds for many arguments.
    """
    used = jnp.arange(page_table.shape[1]) * PAGE < length[:, None]
    known = (page_table > 0) & (page_table < num_pages)
    checkify.debug_check(jnp.all(length <= page_table.shape[1] * PAGE),
                         "a row of {tokens} tokens exceeds its page table", tokens=jnp.max(length))
    checkify.debug_check(jnp.all(known | ~used), "a page table names a page outside 1 .. {last}",
                         last=jnp.asarray(num_pages - 1))


def write_pages(pages: jax.Array | EightBitPages, values: jax.Array, page_table: jax.Array, start: jax.Array,
                length: jax.Array) -> jax.Array | EightBitPages:
    """Write keys or values of new tokens, ``values[B, T, K, H]``, into the cache's ``pages[P, K, PAGE, H]``.

    Token t of row b goes to position ``start[b] + t`` of its row. The caller should donate ``pages``.

    For 8-bit pages, ``values`` are without the bias that reading adds. Tokens at or beyond ``length[b]`` are padding
    and go to page 0, which no row owns.
    """
    positions = start[:, None] + jnp.arange(values.shape[1])
    page = jnp.take_along_axis(page_table, jnp.minimum(positions // PAGE, page_table.shape[1] - 1), axis=1)
    page = jnp.where(positions < length[:, None], page, 0)
    if isinstance(pages, EightBitPages):
        stored = pages.stored.at[page, :, positions % PAGE].set(pages.encode(values))
        return EightBitPages(stored, pages.format)
    return pages.at[page, :, positions % PAGE].set(to_storage(values, pages.dtype))
