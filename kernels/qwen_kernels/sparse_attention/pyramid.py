"""Selectors of pages that estimate attention over a pyramid of key summaries, from the top down.

Their cost is derived in docs/sparse_attention.md.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_kernels.page import PAGE
from qwen_kernels.sparse_attention.summaries import LEAVES, RADIX
from qwen_kernels.sparse_attention.view import View

OPENED = 32  # nodes opened of a level, or more if as many pages are wanted: it bounds selection by O(log N) a block
BY_LEAVES = 8  # pages whose leaves are scored beyond the number that will be taken
BY_KEYS = 3  # pages whose keys are scored one by one, for each page that will be taken
ROWS = 2  # of the rows of a block of queries, one in two is multiplied with these keys
KEY_BYTES = 1 << 26  # of keys that are gathered at a time, as float32
NEAR = 64  # pages before the queries up to which estimates are good enough
SPREAD = 1.5  # measured (docs/sparse_attention.md)


def estimate(q: jax.Array, nodes: jax.Array) -> jax.Array:
    """Estimate the largest product of each query with the keys of each node, ``[B, K, C, R]``.

    q: ``[B, K, R, H]``. nodes: mean and deviation of each node's keys, ``[B, K, C, 2, H]``.

    Channels are taken for independent: then the standard deviation of the products is the root of the sum of squares of
    what each channel adds to it.
    """
    variance = jnp.einsum("bkrh,bkch->bkcr", q * q, jnp.square(nodes[..., 1, :]))
    return jnp.einsum("bkrh,bkch->bkcr", q, nodes[..., 0, :]) + SPREAD * jnp.sqrt(variance)


class Scored(NamedTuple):
    """Pages that a selector has opened, and the attention that each row of the block may pay to them.

    Attributes:
      places: i32 ``[B, K, C]``.
      weights: f32 ``[B, K, C, R]``, estimated attention weights, relative to ``exp(highest)``.
      rest: f32 ``[B, K, R]``, weights of everything that was left closed, and of the pages taken without a rank.
      highest: f32 ``[B, K, R]``, log weights.
    """

    places: jax.Array
    weights: jax.Array
    rest: jax.Array
    highest: jax.Array

    def rank(self, view: View) -> jax.Array:
        """Return the rank of each page ``[B, K, C]``."""
        return _rank(self.weights, self.rest, view.real)


def pyramid(q, view: View, first, last, wanted):
    """Propose and rank pages by estimates of attention, going down a pyramid of nodes and opening only the best.

    A node summarises the keys of one or more pages; below a page are its leaves, of 16 tokens each.

    It scores at most ``TOP`` nodes at the top, ``RADIX * OPENED + RADIX - 1`` at each of the log(N) levels below down
    to pages, and the leaves of ``BY_LEAVES`` pages more than are wanted. A node's share is its part of the weights of
    all scored nodes: nodes left closed count with their own estimates. Nodes are opened, and pages ranked, by the root
    mean square of the rows' shares: between their mean, which is what a page holds, and their largest, which finds the
    single row that retrieves something.
    """
    scored = _descend(q, view, first, last, wanted)
    return scored.places, scored.rank(view)


def flat(q, view: View, first, last, wanted):
    """Rank all pages by estimates for their leaves of 16 tokens: the pyramid's choice if it opened all nodes."""
    scored = _score_all(q, view, last)
    return scored.places, scored.rank(view)


def reranked(q, view: View, first, last, wanted):
    """Rank the pages that the pyramid ranks best, three times as many as are wanted, by their best keys.

    This finds single keys that no estimate for sixteen of them shows, at a cost that is still O(log N) for a block. In
    a block of a page's queries, only the half of the rows with the most attention to ranked pages is multiplied with
    the keys; the others keep their estimates, as do blocks with at most ``NEAR`` pages before them.
    """
    scored = _descend(q, view, first, last, BY_KEYS * wanted)
    ranked = (scored.places >= first) & (scored.places < last[:, None, None])
    estimated, index = jax.lax.top_k(jnp.where(ranked, scored.rank(view), -jnp.inf),
                                     min(BY_KEYS * wanted, scored.places.shape[2]))
    places = jnp.take_along_axis(scored.places, index, axis=2)
    if view.page_table.shape[1] <= NEAR:
        return places, estimated
    weights = jnp.take_along_axis(scored.weights, index[..., None], axis=2)
    rest = jnp.maximum(scored.rest + jnp.sum(scored.weights, axis=2) - jnp.sum(weights, axis=2), 0)
    best = scored._replace(places=places, weights=weights, rest=rest)
    # The predicate is the chunk's, not the block's: blocks are vectorised, and then both branches would be computed.
    rank = jax.lax.cond(view.furthest > NEAR, partial(_rank_by_keys, q, view, best, estimated > -jnp.inf),
                        lambda: estimated)
    return places, jnp.where(view.own[:, None, None] > NEAR, rank, estimated)


def _rank_by_keys(q: jax.Array, view: View, scored: Scored, valid: jax.Array) -> jax.Array:
    """Return the rank of each page by its best keys, ``[B, K, C]``. valid: which pages are ranked."""
    held = jnp.sum(scored.weights, axis=2)
    _, row = jax.lax.top_k(jnp.where(view.real, held / (held + scored.rest), -1),
                           q.shape[2] // ROWS if q.shape[2] >= PAGE else q.shape[2])
    real = jnp.take_along_axis(jnp.broadcast_to(view.real, held.shape), row, axis=2)
    closed = jnp.take_along_axis(jnp.log(scored.rest) + scored.highest, row, axis=2)
    true = _best_products(jnp.take_along_axis(q, row[..., None], axis=2), view, scored.places)
    true, rest, _ = _weights(jnp.where(valid[..., None], true, -jnp.inf), closed)
    others = view.real & ~jnp.any(row[..., None] == jnp.arange(q.shape[2]), axis=2)
    return _log_root(_squares(true, rest, real) + _squares(scored.weights, scored.rest, others), view.real)


def _best_products(q: jax.Array, view: View, places: jax.Array) -> jax.Array:
    """Return the largest product of each query ``q[B, K, R, H]`` with a key of each page, ``[B, K, C, R]``."""
    rows, heads, pages = places.shape
    some = max(1, KEY_BYTES // (rows * heads * PAGE * q.shape[-1] * 4))  # many rows' keys do not fit beside the cache

    def of_some(places):
        return jnp.max(jnp.einsum("bkcph,bkrh->bkcpr", view.keys_of(places), q), axis=3)

    if pages <= some:
        return of_some(places)
    parts = jnp.pad(places, ((0, 0), (0, 0), (0, -pages % some))).reshape(rows, heads, -1, some)
    found = jnp.moveaxis(jax.lax.map(of_some, jnp.moveaxis(parts, 2, 0)), 0, 2)
    return found.reshape(rows, heads, -1, q.shape[2])[:, :, :pages]


def _descend(q: jax.Array, view: View, first: int, last: jax.Array, wanted: int) -> Scored:
    """Score pages by their leaves: those that are found from the top of the pyramid down, opening the best nodes."""
    rows, heads = q.shape[:2]
    if view.page_table.shape[1] <= wanted + first + BY_LEAVES:
        return _score_all(q, view, last)
    top = view.summaries.shape[2] - LEAVES - 1
    opened = min(wanted, max(OPENED, -(-(wanted + first) // RADIX)))
    closed = _local(q, view)
    index = view.for_each_head(jnp.arange(max(1, view.page_table.shape[1] // RADIX**top)))
    valid = (index + 1) * RADIX**top <= last[:, None, None]
    for level in range(top, 0, -1):
        scores = _estimates(q, view.nodes(level, index), valid)
        best, exists, closed = _open_best(scores, closed, view.real, opened)
        children = jnp.take_along_axis(index, best, axis=-1)[..., None] * RADIX + jnp.arange(RADIX)
        born = jnp.broadcast_to(exists[..., None], children.shape)
        # Whole nodes of the level below that lie under no whole node of this level.
        loose = view.for_each_head((last // RADIX**level * RADIX)[:, None] + jnp.arange(RADIX - 1))
        index = jnp.concatenate([children.reshape(rows, heads, -1), loose], axis=-1)
        valid = jnp.concatenate([born.reshape(rows, heads, -1), (loose + 1) * RADIX ** (level - 1)
                                 <= last[:, None, None]], axis=-1)
    scores = _estimates(q, view.nodes(0, index), valid)
    best, exists, closed = _open_best(scores, closed, view.real, wanted + first + BY_LEAVES)
    index = jnp.take_along_axis(index, best, axis=-1)
    return _by_leaves(q, view, index, exists, closed)


def _score_all(q: jax.Array, view: View, last: jax.Array) -> Scored:
    """Score all pages by their leaves."""
    index = view.pages()
    return _by_leaves(q, view, index, index < last[:, None, None], _local(q, view))


def _open_best(scores: jax.Array, closed: jax.Array, real: jax.Array, count: int
               ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose the ``count`` best nodes of a level of the pyramid; only their children are scored next.

    scores: ``[B, K, C, R]``. closed: log of the summed weights of all nodes left closed so far, ``[B, K, R]``. Returns
    indices i32 ``[B, K, count]``, whether each is a node at all, and ``closed`` with this level's other nodes added.
    """
    weights, rest, highest = _weights(scores, closed)
    best, index = jax.lax.top_k(_rank(weights, rest, real), min(count, scores.shape[2]))
    left = ~jnp.any(jnp.arange(scores.shape[2]) == index[..., None], axis=-2)
    rest += jnp.sum(jnp.where(left[..., None], weights, 0), axis=2)
    return index, best > -jnp.inf, highest + jnp.log(rest)


def _local(q: jax.Array, view: View) -> jax.Array:
    """Return the log of the estimated attention weights of the pages taken without a rank, summed: ``[B, K, R]``."""
    places = view.for_each_head(view.own[:, None] - jnp.arange(view.local))
    return jax.nn.logsumexp(_estimates(q, view.nodes(0, places), places >= 0), axis=2)


def _by_leaves(q: jax.Array, view: View, places: jax.Array, valid: jax.Array, closed: jax.Array) -> Scored:
    """Score the pages ``places`` i32 ``[B, K, C]`` by estimated attention weights, summed over their leaves."""
    leaves = view.leaves(places)
    leaves = leaves.reshape(*places.shape[:2], -1, *leaves.shape[4:])
    weights, rest, highest = _weights(_estimates(q, leaves, jnp.repeat(valid, LEAVES, axis=-1)), closed)
    return Scored(places, weights.reshape(*places.shape, LEAVES, weights.shape[-1]).sum(axis=3), rest, highest)


def _estimates(q: jax.Array, nodes: jax.Array, valid: jax.Array) -> jax.Array:
    """Return `estimate` for each node, the largest product of query and key; -inf for nodes that are not valid."""
    return jnp.where(valid[..., None], estimate(q, nodes), -jnp.inf)


def _weights(scores: jax.Array, closed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turn log weights into weights relative to the highest log weight of each row.

    Returns ``exp(scores - highest)``, ``exp(closed - highest)`` and ``highest``.

    scores: ``[B, K, C, R]``. closed: ``[B, K, R]``.

    Rows come last: sums over nodes are then many sums at once, which is faster on a CPU.
    """
    highest = jnp.maximum(jnp.max(scores, axis=2), closed)
    return jnp.exp(scores - highest[:, :, None]), jnp.exp(closed - highest), highest


def _rank(weights: jax.Array, rest: jax.Array, real: jax.Array) -> jax.Array:
    """Return the rank of each node, ``[B, K, C]``: the log of the root mean square of its shares of rows' weights.

    weights: ``[B, K, C, R]``. rest: ``[B, K, R]``, summed weights that count in the total only. real: rows that are
    not padding.
    """
    return _log_root(_squares(weights, rest, real), real)


def _log_root(squares: jax.Array, real: jax.Array) -> jax.Array:
    """Return the log of the root mean square, given sums of squares ``[B, K, C]`` over the real rows."""
    return jnp.log(squares / jnp.maximum(jnp.sum(real, axis=-1), 1)[..., None]) / 2


def _squares(weights: jax.Array, rest: jax.Array, real: jax.Array) -> jax.Array:
    """Return the sum over the real rows of the square of each node's share of a row's weights, ``[B, K, C]``."""
    total = jnp.sum(weights, axis=2) + rest
    squares = jnp.where(real[:, :, None], weights * weights, 0)
    return jnp.einsum("bkcr,bkr->bkc", squares, jnp.where(real, 1 / (total * total), 0))
