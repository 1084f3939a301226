"""Which pages a block of queries attends to: a selector ranks them, and one set of rules says how many are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_kernels.sparse_attention.selectors import SELECTORS, View


@dataclass(frozen=True)
class Sparsity:
    """How sparse attention is. Counts are pages unless said."""

    selector: str = "pyramid"
    budget: float = 2.0      # ranked pages: at most budget * log2(pages before the queries), rounded up
    sink: int = 1            # at the beginning of the row, always taken
    local: int = 2           # up to and with the queries' own, always taken
    dense_tail: int = 128    # last tokens of a prompt: blocks of queries with any of them attend to everything
    threshold: float = 0.0   # ranked pages whose rank, an estimated share of attention, is smaller are left out
    dense_heads: tuple[int, ...] = ()  # KV heads that attend to everything

    def __post_init__(self):
        if self.selector not in SELECTORS:
            raise ValueError(f"unknown selector {self.selector!r}; known: {', '.join(SELECTORS)}")
        if self.local < 1 or min(self.sink, self.budget, self.dense_tail, self.threshold) < 0:
            raise ValueError("sparse attention needs local of at least 1 and nothing negative")

    def ranked(self, pages: int) -> int:
        """How many pages are chosen by rank for queries with ``pages`` pages before them."""
        return math.ceil(self.budget * math.log2(max(pages, 1)))


class Selection(NamedTuple):
    """For every row B, block of queries Q, and KV head K: the pages it attends to."""

    places: jax.Array  # i32[B, Q, K, M]: ascending indices into the row of the page table; beyond ``count``, HIDDEN
    count: jax.Array   # i32[B, Q, K]
    dense: jax.Array   # bool[B, Q, K]: takes every page before it, whatever ``places`` say; counted in ``count``


BLOCKS = 4        # that choose at once: choosing is many small operations
HIDDEN = 1 << 24  # the place of no page: beyond every row


def query_block(tokens: int, page: int) -> int:
    """Queries that share a selection: those of a page in a prefill, whose chunks are whole pages; one in decode.

    Blocks are pages, whatever the chunks, so a prompt is computed the same way in one chunk or in many.
    """
    return page if tokens % page == 0 else 1


def select(q: jax.Array, k_pages: jax.Array, summaries: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, prompt_length: jax.Array, sparsity: Sparsity) -> Selection:
    """The pages that each block of queries of ``q[B, T, K, G, H]`` attends to; arguments as ``sparse_attention``'s."""
    page, heads = k_pages.shape[2], sparse_heads(q.shape[2], sparsity)
    every = q.shape[2]
    q = q[:, :, heads]
    rows, tokens, kv_heads, group, dim = q.shape
    size = query_block(tokens, page)
    scaled = q.astype(jnp.float32) * dim**-0.5
    blocks = scaled.reshape(rows, tokens // size, size, kv_heads, group, dim).transpose(1, 0, 3, 4, 2, 5)
    blocks = blocks.reshape(tokens // size, rows, kv_heads, group * size, dim)

    def one(item):
        index, queries = item
        first = start + index * size
        # Padding ranks nothing: it would make a block's choice depend on what happens to be in it.
        positions = jnp.tile(first[:, None] + jnp.arange(size), group)
        view = View(k_pages, summaries, page_table, heads, first // page, positions,
                    (positions < length[:, None])[:, None], sparsity.local)
        tail = (first < prompt_length) & (first + size > prompt_length - sparsity.dense_tail)
        everything = jnp.broadcast_to(jnp.where(first < length, view.own + 1, 0)[:, None], (rows, every))
        dense = jnp.ones((rows, every), bool).at[:, heads].set(tail[:, None])
        chosen, count = _choose(queries, view, sparsity)
        places = jnp.full((rows, every, chosen.shape[-1]), HIDDEN).at[:, heads].set(chosen)
        count = everything.at[:, heads].min(jnp.where(tail[:, None], HIDDEN, count))
        return places, count, dense

    if len(blocks) == 1:
        found = jax.tree.map(lambda x: x[None], one((0, blocks[0])))
    else:
        found = jax.lax.map(one, (jnp.arange(len(blocks)), blocks), batch_size=min(len(blocks), BLOCKS))
    return Selection(*(x.swapaxes(0, 1) for x in found))


def sparse_heads(kv_heads: int, sparsity: Sparsity) -> np.ndarray:
    """The KV heads that do not attend to everything."""
    return np.setdiff1d(np.arange(kv_heads), sparsity.dense_heads)


def _choose(q: jax.Array, view: View, sparsity: Sparsity) -> tuple[jax.Array, jax.Array]:
    """Places i32[B, K, M] and their number i32[B, K] for one block of queries ``q[B, K, rows, H]``."""
    rows, kv_heads = q.shape[:2]
    width = view.page_table.shape[1]
    first, last = min(sparsity.sink, width), view.own + 1 - sparsity.local  # pages first .. last - 1 are ranked
    local = jnp.maximum(last, first)[:, None] + jnp.arange(sparsity.local)
    always = jnp.concatenate([jnp.broadcast_to(jnp.arange(first), (rows, first)), local], axis=1)
    always = jnp.where(always <= view.own[:, None], always, HIDDEN)
    places = jnp.broadcast_to(always[:, None], (rows, kv_heads, always.shape[1]))

    most = min(sparsity.ranked(width), max(0, width - first - sparsity.local))
    if most:
        candidates, rank = SELECTORS[sparsity.selector](q, view, first, last, most)
        ranked = (candidates >= first) & (candidates < last[:, None, None]) & (rank > -jnp.inf)
        if sparsity.threshold:
            ranked &= rank >= math.log(sparsity.threshold)
        best, index = jax.lax.top_k(jnp.where(ranked, rank, -jnp.inf), min(most, rank.shape[-1]))
        allowed = _budgets(sparsity, width)[jnp.clip(view.own, 0, width - 1)]
        taken = (best > -jnp.inf) & (jnp.arange(best.shape[-1]) < allowed[:, None, None])
        chosen = jnp.where(taken, jnp.take_along_axis(candidates, index, axis=-1), HIDDEN)
        places = jnp.concatenate([places, chosen], axis=-1)
    places = jnp.sort(places, axis=-1)
    return places, jnp.sum(places < HIDDEN, axis=-1)


def _budgets(sparsity: Sparsity, width: int) -> jax.Array:
    return jnp.array([sparsity.ranked(pages) for pages in range(width)], jnp.int32)
