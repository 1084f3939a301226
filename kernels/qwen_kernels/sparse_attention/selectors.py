"""Selectors: what ranks pages for a block of queries.

A selector is a function ``(q, view, first, last, most) -> (places, rank)``: for queries ``q[B, K, R, H]``, scaled and
float32, it proposes pages ``places`` i32[B, K, C] and how much each is wanted, ``rank`` f32[B, K, C]. It may propose
any page; only those of ``first <= place < last[b]`` count, of which the ``most`` best are taken. To add one, write the
function and enter it in ``SELECTORS``.

A rank is the largest share, over the rows of the block, of the attention that a row is estimated to give to a page:
one row that retrieves something must not drown among others that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_kernels.attention.storage import from_storage
from qwen_kernels.sparse_attention.summaries import LEAVES, RADIX


class View(NamedTuple):
    """What a selector may look at, for one block of queries of every row."""

    k_pages: jax.Array     # [P, K, PAGE, H] as stored
    summaries: jax.Array   # [P, K, nodes, 2, H] as stored
    page_table: jax.Array  # i32[B, N]
    heads: np.ndarray      # i32[K]: which of the pages' heads the queries' are
    own: jax.Array         # i32[B]: the page that the queries stand in; later ones do not exist for them
    positions: jax.Array   # i32[B, R] of the queries
    known: jax.Array       # bool[B, 1, R]: queries that are no padding
    local: int             # pages up to and with `own` that are taken anyway

    def keys(self) -> jax.Array:
        """Every key of the rows, ``[B, K, N, PAGE, H]``: linear in the context, which a fast selector avoids."""
        return from_storage(self.k_pages[self.page_table[:, None], self.heads[:, None]]).astype(jnp.float32)

    def nodes(self, level: int, index: jax.Array) -> jax.Array:
        """Nodes ``index`` i32[B, K, C] of a level (0: pages), ``[B, K, C, 2, H]``; those of no whole node: anything."""
        return self._stored(index, RADIX**level, LEAVES + level)

    def leaves(self, places: jax.Array) -> jax.Array:
        """The leaves of pages i32[B, K, C], ``[B, K, C, LEAVES, 2, H]``."""
        return self._stored(places, 1, slice(0, LEAVES))

    def _stored(self, index, span: int, slot) -> jax.Array:
        rows = index.shape[0]
        last = jnp.clip((index + 1) * span - 1, 0, self.page_table.shape[1] - 1)
        ids = jnp.take_along_axis(self.page_table, last.reshape(rows, -1), axis=1).reshape(index.shape)
        return from_storage(self.summaries[ids, self.heads[:, None], slot]).astype(jnp.float32)

    def pages(self) -> jax.Array:
        """All places of the rows, i32[B, K, N]."""
        rows, width = self.page_table.shape
        return jnp.broadcast_to(jnp.arange(width), (rows, len(self.heads), width))

    def shares(self, scores: jax.Array) -> jax.Array:
        """Log-shares of pages ``[B, K, N]`` from each row's scores of all pages, ``[B, K, R, N]``."""
        exists = jnp.arange(scores.shape[-1]) <= self.own[:, None, None, None]
        return largest_share(jnp.where(exists, scores, -jnp.inf), self.known)


def largest_share(scores: jax.Array, known: jax.Array) -> jax.Array:
    """The largest log-share over rows, ``[B, K, C]``, of scores ``[B, K, R, C]``; a row's shares add up to one."""
    shares = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return jnp.max(jnp.where(known[..., None], shares, -jnp.inf), axis=2)


def bound(q: jax.Array, nodes: jax.Array) -> jax.Array:
    """An upper bound of q . k over the keys of each node, from ``q[B, K, R, H]`` and ``nodes[B, K, C, 2, H]``."""
    parts = jnp.concatenate([jnp.minimum(q, 0), jnp.maximum(q, 0)], axis=-1)  # with the least, and with the greatest
    return jnp.einsum("bkrx,bkcx->bkrc", parts, nodes.reshape(*nodes.shape[:3], -1))


def quest(q, view: View, first, last, most):
    """Bounds of whole pages, as Quest has them (https://arxiv.org/abs/2406.10774)."""
    places = view.pages()
    return places, view.shares(bound(q, view.nodes(0, places)))


def leaf_bounds(q, view: View, first, last, most):
    """The best bound among the four leaves of each page."""
    places = view.pages()
    leaves = view.leaves(places)
    scores = bound(q, leaves.reshape(*leaves.shape[:2], -1, *leaves.shape[4:]))
    return places, view.shares(scores.reshape(*scores.shape[:-1], -1, LEAVES).max(axis=-1))


def mean_pooled(q, view: View, first, last, most):
    """The mean query of the block with the mean key of each page (InfLLM, MInference's block-sparse heads)."""
    pooled = jnp.sum(jnp.where(view.known[..., None], q, 0), axis=2, keepdims=True)
    pooled /= jnp.maximum(jnp.sum(view.known, axis=2), 1)[..., None, None]
    scores = jnp.einsum("bkrh,bknh->bkrn", pooled, view.keys().mean(axis=3))
    return view.pages(), scores[:, :, 0]


STRIDE = 8


def strided(q, view: View, first, last, most):
    """Sums along antidiagonals of every page, a stride apart, as XAttention has them (https://arxiv.org/abs/2503.16428).

    One query sees the mean of every stride of keys instead.
    """
    keys = view.keys()
    heads, _, page, dim = keys.shape[1:]
    rows = q.shape[2]
    strided_keys = keys.reshape(*keys.shape[:3], page // STRIDE, STRIDE, dim)
    if rows % page:
        scores = jnp.einsum("bkrh,bknch->bkrnc", q, strided_keys.mean(axis=4))
    else:
        queries = jnp.where(view.known[..., None], q, 0).reshape(len(q), heads, rows // STRIDE, STRIDE, dim)
        scores = jnp.einsum("bkrsh,bkncsh->bkrnc", queries[:, :, :, ::-1], strided_keys) / STRIDE
    exists = jnp.arange(keys.shape[2])[:, None] <= view.own[:, None, None, None, None]
    scores = jnp.where(exists, scores, -jnp.inf)
    shares = jax.nn.softmax(scores.reshape(*scores.shape[:3], -1), axis=-1).reshape(scores.shape)
    return view.pages(), jnp.log(jnp.mean(jnp.sum(shares, axis=-1), axis=2))


def window(q, view: View, first, last, most):
    """The latest pages: with the sink, a sliding window (StreamingLLM, https://arxiv.org/abs/2309.17453)."""
    places = view.pages()
    return places, places.astype(jnp.float32)


def oracle(q, view: View, first, last, most):
    """The true shares, from full attention: what any selector can reach, at full attention's cost."""
    keys = view.keys()
    scores = jnp.einsum("bkrh,bknph->bkrnp", q, keys)
    visible = jnp.arange(keys.shape[2] * keys.shape[3]).reshape(keys.shape[2:4]) <= view.positions[..., None, None]
    return view.pages(), view.shares(jax.nn.logsumexp(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1))


OPENED = 32  # nodes of a level, unless more pages are wanted than these have: it bounds selection by O(log N) a block


def pyramid(q, view: View, first, last, most):
    """Bounds of nodes of a pyramid over the pages, from the top down; at every level only the best are opened.

    Looks at no more than ``TOP`` nodes at the top and ``RADIX * OPENED + RADIX - 1`` at each of the log(N) levels
    below, and ranks them by their share of all that it looked at: nodes left closed count with their own bounds.
    """
    rows, heads = q.shape[:2]
    top = view.summaries.shape[2] - LEAVES - 1
    opened_most = min(most, max(OPENED, -(-(most + first) // RADIX)))

    def every(index):  # i32[B, C] or [C] to [B, K, C]
        return jnp.broadcast_to(index, (rows, heads, index.shape[-1])) if index.ndim == 1 else jnp.broadcast_to(
            index[:, None], (rows, heads, index.shape[-1]))

    def score(level, index, valid):
        return jnp.where(valid[:, :, None], bound(q, view.nodes(level, index)), -jnp.inf)

    local = every(view.own[:, None] - jnp.arange(view.local))
    closed = jax.nn.logsumexp(score(0, local, local >= 0), axis=-1)  # [B, K, R]

    index = every(jnp.arange(max(1, view.page_table.shape[1] // RADIX**top)))
    valid = (index + 1) * RADIX**top <= last[:, None, None]
    for level in range(top, 0, -1):
        scores = score(level, index, valid)
        best, at = jax.lax.top_k(_rank(scores, closed, view.known), min(opened_most, index.shape[-1]))
        opened = jnp.any(jnp.arange(index.shape[-1]) == at[..., None], axis=-2)
        closed = jnp.logaddexp(closed, jax.nn.logsumexp(jnp.where(opened[:, :, None], -jnp.inf, scores), axis=-1))
        children = jnp.take_along_axis(index, at, axis=-1)[..., None] * RADIX + jnp.arange(RADIX)
        born = jnp.broadcast_to((best > -jnp.inf)[..., None], children.shape)
        # Whole nodes of the level below that lie under none of this level.
        loose = every((last // RADIX**level * RADIX)[:, None] + jnp.arange(RADIX - 1))
        index = jnp.concatenate([children.reshape(rows, heads, -1), loose], axis=-1)
        valid = jnp.concatenate([born.reshape(rows, heads, -1), (loose + 1) * RADIX ** (level - 1)
                                 <= last[:, None, None]], axis=-1)
    return index, _rank(score(0, index, valid), closed, view.known)


def _rank(scores: jax.Array, closed: jax.Array, known: jax.Array) -> jax.Array:
    """The largest log-share over rows of ``scores[B, K, R, C]`` among themselves and what ``closed`` adds up to."""
    total = jnp.logaddexp(closed, jax.nn.logsumexp(scores, axis=-1))
    return jnp.max(jnp.where(known[..., None], scores - total[..., None], -jnp.inf), axis=2)


SELECTORS: dict[str, Callable] = {"pyramid": pyramid, "quest": quest, "leaf_bounds": leaf_bounds,
                                  "mean_pooled": mean_pooled, "strided": strided, "window": window, "oracle": oracle}
