"""Default selector of pages: estimates attention over a pyramid of key summaries, from the top down.

Its cost is derived in docs/sparse_attention.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.sparse_attention.summaries import LEAVES, RADIX
from qwen_kernels.sparse_attention.view import View

OPENED = 32  # nodes opened of a level, or more if as many pages are wanted: it bounds selection by O(log N) a block
RERANKED = 8  # pages whose leaves are scored beyond the number that will be taken
SPREAD = 1.5  # measured (docs/sparse_attention.md)


def estimate(q: jax.Array, nodes: jax.Array) -> jax.Array:
    """Estimate the largest product of each query with the keys of each node, ``[B, K, C, R]``.

    q: ``[B, K, R, H]``. nodes: mean and deviation of each node's keys, ``[B, K, C, 2, H]``.

    Channels are taken for independent: then the standard deviation of the products is the root of the sum of squares of
    what each channel adds to it.
    """
    variance = jnp.einsum("bkrh,bkch->bkcr", q * q, jnp.square(nodes[..., 1, :]))
    return jnp.einsum("bkrh,bkch->bkcr", q, nodes[..., 0, :]) + SPREAD * jnp.sqrt(variance)


def pyramid(q, view: View, first, last, wanted):
    """Propose and rank pages by estimates of attention, going down a pyramid of nodes and opening only the best.

    A node summarises the keys of one or more pages; below a page are its leaves, of 16 tokens each.

    It scores at most ``TOP`` nodes at the top, ``RADIX * OPENED + RADIX - 1`` at each of the log(N) levels below down
    to pages, and the leaves of ``RERANKED`` pages more than are wanted. A node's share is its part of the weights of
    all scored nodes: nodes left closed count with their own estimates. Nodes are opened, and pages ranked, by the root
    mean square of the rows' shares: between their mean, which is what a page holds, and their largest, which finds the
    single row that retrieves something.
    """
    rows, heads = q.shape[:2]
    if view.page_table.shape[1] <= wanted + first + RERANKED:
        return flat(q, view, first, last, wanted)
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
    best, exists, closed = _open_best(scores, closed, view.real, wanted + first + RERANKED)
    index = jnp.take_along_axis(index, best, axis=-1)
    return index, _by_leaves(q, view, index, exists, closed)


def flat(q, view: View, first, last, wanted):
    """Rank all pages by estimates for their leaves of 16 tokens: the pyramid's choice if it opened all nodes."""
    index = view.pages()
    return index, _by_leaves(q, view, index, index < last[:, None, None], _local(q, view))


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


def _by_leaves(q: jax.Array, view: View, places: jax.Array, valid: jax.Array, closed: jax.Array) -> jax.Array:
    """Rank the pages ``places`` i32 ``[B, K, C]`` by estimated attention weights, summed over their leaves."""
    leaves = view.leaves(places)
    leaves = leaves.reshape(*places.shape[:2], -1, *leaves.shape[4:])
    weights, rest, _ = _weights(_estimates(q, leaves, jnp.repeat(valid, LEAVES, axis=-1)), closed)
    weights = weights.reshape(*places.shape, LEAVES, weights.shape[-1]).sum(axis=3)
    return _rank(weights, rest, view.real)


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
    total = jnp.sum(weights, axis=2) + rest
    scale = jnp.where(real, 1 / (total * total), 0) / jnp.maximum(jnp.sum(real, axis=-1), 1)[..., None]
    squares = jnp.where(real[:, :, None], weights * weights, 0)
    return jnp.log(jnp.einsum("bkcr,bkr->bkc", squares, scale)) / 2
