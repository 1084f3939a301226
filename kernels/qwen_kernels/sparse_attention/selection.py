"""Selection of the pages that a block of queries attends to: a selector ranks them, and the best are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_kernels.sparse_attention.selectors import SELECTORS, View

PARALLEL_BLOCKS = 4  # blocks of queries that select at once: selecting is many small operations
HIDDEN = 1 << 24  # place of no page: beyond every row


@dataclass(frozen=True)
class Sparsity:
    """Settings of sparse attention in one layer: which pages a block of queries attends to.

    Attributes:
      selector: name of the function in ``SELECTORS`` that ranks pages.
      budget: at most ``budget * log2(pages before the queries)`` ranked pages are taken, rounded up.
      sink: number of pages at the beginning of the row that are always taken.
      local: number of pages up to and with the queries' own that are always taken.
      dense_tail: last tokens of a prompt; a block of queries with any of them attends to everything.
      threshold: ranked pages whose estimated share of attention is smaller are left out.
      dense_heads: KV heads that attend to everything.
    """

    selector: str = "reranked"
    budget: float = 3.0
    sink: int = 1
    local: int = 2
    dense_tail: int = 128
    threshold: float = 0.0
    dense_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.selector not in SELECTORS:
            raise ValueError(f"selector must be one of {', '.join(SELECTORS)}, not {self.selector!r}")
        if self.local < 1:
            raise ValueError(f"local must be at least 1, not {self.local!r}")
        for name in ("sink", "budget", "dense_tail", "threshold"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)!r}")

    def ranked(self, pages: int) -> int:
        """Return the most pages taken by rank (not counting those always taken) after ``pages`` earlier pages."""
        return math.ceil(self.budget * math.log2(max(pages, 1)))


class Selection(NamedTuple):
    """Pages selected for each row B, block of queries Q, and KV head K: those that attention reads.

    Attributes:
      places: i32 ``[B, Q, K, M]``, ascending indices of pages in the row of the page table; beyond ``count``, HIDDEN.
      count: i32 ``[B, Q, K]``, number of pages.
      dense: bool ``[B, Q, K]``; if set, the first ``count`` pages of the row are taken, and ``places`` is ignored.
    """

    places: jax.Array
    count: jax.Array
    dense: jax.Array


def query_block(tokens: int, page: int) -> int:
    """Return the number of queries that share a selection: a page of them in a prefill, one in decode.

    A prefill's chunks are whole pages. So a prompt is computed the same way in one chunk or in many.
    """
    return page if tokens % page == 0 else 1


def select(q: jax.Array, k_pages: jax.Array, summaries: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, prompt_length: jax.Array, sparsity: Sparsity) -> Selection:
    """Select the pages that each block of queries of ``q[B, T, K, G, H]`` attends to.

    The arguments are those of ``api.sparse_attention``.
    """
    page, heads = k_pages.shape[2], sparse_heads(q.shape[2], sparsity)
    all_heads = q.shape[2]
    q = q[:, :, heads]
    rows, tokens, kv_heads, group, dim = q.shape
    size = query_block(tokens, page)
    scaled = q.astype(jnp.float32) * dim**-0.5
    blocks = scaled.reshape((rows, tokens // size, size, kv_heads, group, dim)).transpose((1, 0, 3, 4, 2, 5))
    blocks = blocks.reshape(tokens // size, rows, kv_heads, group * size, dim)

    furthest = (jnp.max(start) + tokens - 1) // page

    def select_block(item):
        index, queries = item
        first = start + index * size
        positions = jnp.tile(first[:, None] + jnp.arange(size), group)
        # Padding ranks nothing: a block's choice must not depend on what happens to be in it.
        view = View(k_pages, summaries, page_table, heads, own=first // page, positions=positions,
                    real=(positions < length[:, None])[:, None], local=sparsity.local, furthest=furthest)
        tail = (first < prompt_length) & (first + size > prompt_length - sparsity.dense_tail)
        everything = jnp.broadcast_to(jnp.where(first < length, view.own + 1, 0)[:, None], (rows, all_heads))
        dense = jnp.ones((rows, all_heads), bool).at[:, heads].set(tail[:, None])
        taken, count = _take(queries, view, sparsity)
        places = jnp.full((rows, all_heads, taken.shape[-1]), HIDDEN).at[:, heads].set(taken)
        count = everything.at[:, heads].min(jnp.where(tail[:, None], HIDDEN, count))
        return places, count, dense

    if len(blocks) == 1:
        selected = jax.tree.map(lambda x: x[None], select_block((0, blocks[0])))
    else:
        selected = jax.lax.map(select_block, (jnp.arange(len(blocks)), blocks),
                               batch_size=min(len(blocks), PARALLEL_BLOCKS))
    return Selection(*(x.swapaxes(0, 1) for x in selected))


def sparse_heads(kv_heads: int, sparsity: Sparsity) -> np.ndarray:
    """Return the KV heads whose pages are selected: all but those that attend to everything."""
    return np.setdiff1d(np.arange(kv_heads), sparsity.dense_heads)


def _take(q: jax.Array, view: View, sparsity: Sparsity) -> tuple[jax.Array, jax.Array]:
    """Choose the pages for a block of queries ``q[B, K, R, H]``: places i32 ``[B, K, M]`` and counts i32 ``[B, K]``."""
    rows, kv_heads = q.shape[:2]
    width = view.page_table.shape[1]
    first, last = min(sparsity.sink, width), view.own + 1 - sparsity.local  # pages first .. last - 1 are ranked
    local = jnp.maximum(last, first)[:, None] + jnp.arange(sparsity.local)
    always = jnp.concatenate([jnp.broadcast_to(jnp.arange(first), (rows, first)), local], axis=1)
    always = jnp.where(always <= view.own[:, None], always, HIDDEN)
    places = jnp.broadcast_to(always[:, None], (rows, kv_heads, always.shape[1]))

    wanted = min(sparsity.ranked(width), max(0, width - first - sparsity.local))
    if wanted:
        candidates, rank = SELECTORS[sparsity.selector](q, view, first, last, wanted)
        ranked = (candidates >= first) & (candidates < last[:, None, None]) & (rank > -jnp.inf)
        if sparsity.threshold:
            ranked &= rank >= math.log(sparsity.threshold)
        best, index = jax.lax.top_k(jnp.where(ranked, rank, -jnp.inf), min(wanted, rank.shape[-1]))
        allowed = _budgets(sparsity, width)[jnp.clip(view.own, 0, width - 1)]
        taken = (best > -jnp.inf) & (jnp.arange(best.shape[-1]) < allowed[:, None, None])
        chosen = jnp.where(taken, jnp.take_along_axis(candidates, index, axis=-1), HIDDEN)
        places = jnp.concatenate([places, chosen], axis=-1)
    places = jnp.sort(places, axis=-1)
    return places, jnp.sum(places < HIDDEN, axis=-1)


def _budgets(sparsity: Sparsity, width: int) -> jax.Array:
    """Return the most pages taken by rank after 0 to ``width - 1`` earlier pages, i32 ``[width]``."""
    return jnp.array([sparsity.ranked(pages) for pages in range(width)], jnp.int32)
