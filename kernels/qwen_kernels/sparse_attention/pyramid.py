"""The default selector: estimates over a pyramid of nodes, from the top down. Its cost is derived in
docs/sparse_attention.md."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.sparse_attention.summaries import LEAVES, RADIX
from qwen_kernels.sparse_attention.view import View

OPENED = 32   # nodes of a level, unless more pages are wanted than these have: it bounds selection by O(log N) a block
RERANKED = 8  # pages whose leaves are looked at beside those that will be taken
SPREAD = 1.5  # measured (docs/sparse_attention.md)


def estimate(q: jax.Array, nodes: jax.Array) -> jax.Array:
    """About the largest q . k over the keys of each node, arguments as ``bound``'s.

    Channels are taken for independent: then q . k strays from the middle of the node's box by the root of the squares
    of what each channel may add, where the bound adds them all up.
    """
    least, greatest = nodes[..., 0, :], nodes[..., 1, :]
    middle, half = (least + greatest) / 2, (greatest - least) / 2
    stray = jnp.einsum("bkrh,bkch->bkcr", q * q, half * half)
    return jnp.einsum("bkrh,bkch->bkcr", q, middle) + SPREAD * jnp.sqrt(stray)


def pyramid(q, view: View, first, last, most):
    """Estimates of nodes of a pyramid over the leaves, from the top down; at every level only the best are opened.

    Looks at no more than ``TOP`` nodes at the top, ``RADIX * OPENED + RADIX - 1`` at each of the log(N) levels below
    down to pages, and at the leaves of ``RERANKED`` pages more than are wanted. The share of a node is that of all that
    was looked at: nodes left closed count with their own estimates. What is opened, and a page's rank, go by the root
    mean square of the rows' shares: between their mean, which is what a page holds, and their largest, which finds the
    one row that retrieves something.
    """
    rows, heads = q.shape[:2]
    if view.page_table.shape[1] <= most + first + RERANKED:
        return flat(q, view, first, last, most)
    top = view.summaries.shape[2] - LEAVES - 1
    opened_most = min(most, max(OPENED, -(-(most + first) // RADIX)))

    def open_best(scores, closed, most):
        """Which nodes are best, whether each is any, and what all others and ``closed`` add up to."""
        weights, others, highest = _weights(scores, closed)
        best, at = jax.lax.top_k(_rank(weights, others, view.known), min(most, scores.shape[2]))
        left = ~jnp.any(jnp.arange(scores.shape[2]) == at[..., None], axis=-2)
        others += jnp.sum(jnp.where(left[..., None], weights, 0), axis=2)
        return at, best > -jnp.inf, highest + jnp.log(others)

    closed = _local(q, view)
    index = view.every(jnp.arange(max(1, view.page_table.shape[1] // RADIX**top)))
    valid = (index + 1) * RADIX**top <= last[:, None, None]
    for level in range(top, 0, -1):
        at, some, closed = open_best(_estimates(q, view.nodes(level, index), valid), closed, opened_most)
        children = jnp.take_along_axis(index, at, axis=-1)[..., None] * RADIX + jnp.arange(RADIX)
        born = jnp.broadcast_to(some[..., None], children.shape)
        # Whole nodes of the level below that lie under none of this level.
        loose = view.every((last // RADIX**level * RADIX)[:, None] + jnp.arange(RADIX - 1))
        index = jnp.concatenate([children.reshape(rows, heads, -1), loose], axis=-1)
        valid = jnp.concatenate([born.reshape(rows, heads, -1), (loose + 1) * RADIX ** (level - 1)
                                 <= last[:, None, None]], axis=-1)
    at, some, closed = open_best(_estimates(q, view.nodes(0, index), valid), closed, most + first + RERANKED)
    index = jnp.take_along_axis(index, at, axis=-1)
    return index, _by_leaves(q, view, index, some, closed)


def flat(q, view: View, first, last, most):
    """What the pyramid would choose if it looked at the leaves of every page."""
    index = view.pages()
    return index, _by_leaves(q, view, index, index < last[:, None, None], _local(q, view))


def _local(q: jax.Array, view: View) -> jax.Array:
    """What pages that are taken anyway add up to, as log, ``[B, K, R]``."""
    places = view.every(view.own[:, None] - jnp.arange(view.local))
    return jax.nn.logsumexp(_estimates(q, view.nodes(0, places), places >= 0), axis=2)


def _by_leaves(q: jax.Array, view: View, places: jax.Array, valid: jax.Array, closed: jax.Array) -> jax.Array:
    """The rank of pages i32[B, K, C] by what their leaves add up to."""
    leaves = view.leaves(places)
    leaves = leaves.reshape(*places.shape[:2], -1, *leaves.shape[4:])
    weights, others, _ = _weights(_estimates(q, leaves, jnp.repeat(valid, LEAVES, axis=-1)), closed)
    weights = weights.reshape(*places.shape, LEAVES, weights.shape[-1]).sum(axis=3)
    return _rank(weights, others, view.known)


def _estimates(q: jax.Array, nodes: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid[..., None], estimate(q, nodes), -jnp.inf)


def _weights(scores: jax.Array, closed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``exp`` of ``scores[B, K, C, R]`` and of ``closed[B, K, R]``, each over the highest of a row; and that, as log.

    Rows come last: sums over nodes are then many sums at once, which is faster on a CPU.
    """
    highest = jnp.maximum(jnp.max(scores, axis=2), closed)
    return jnp.exp(scores - highest[:, :, None]), jnp.exp(closed - highest), highest


def _rank(weights: jax.Array, others: jax.Array, known: jax.Array) -> jax.Array:
    """Log of the root mean square, over rows, of the shares of ``weights[B, K, C, R]`` among themselves and others."""
    total = jnp.sum(weights, axis=2) + others
    scale = jnp.where(known, 1 / (total * total), 0) / jnp.maximum(jnp.sum(known, axis=-1), 1)[..., None]
    squares = jnp.where(known[:, :, None], weights * weights, 0)
    return jnp.log(jnp.einsum("bkcr,bkr->bkc", squares, scale)) / 2
