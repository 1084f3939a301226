"""Share of full attention that falls on selected pages, computed by brute force."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from qwen_kernels.attention import PAGE, page_dtype
from qwen_kernels.attention.storage import to_storage
from qwen_kernels.sparse_attention import Selection, Sparsity, attend, new_summaries, select, update_summaries
from qwen_kernels.sparse_attention.reference import page_mask

NEEDED = 0.25  # a page is needed if it has a larger share of some query's attention


class Paged:
    """Keys and values of one text, stored on pages in order, to select pages from and attend to."""

    def __init__(self, k: jax.Array, v: jax.Array, length):
        def pages(x):
            stored = to_storage(x[0].reshape(-1, PAGE, *x.shape[2:]).swapaxes(1, 2), page_dtype(x.dtype))
            return jnp.concatenate([jnp.zeros_like(stored[:1]), stored])

        self.k, self.v = pages(k), pages(v)
        self.table = jnp.arange(1, len(self.k))[None]
        self.start, self.length = jnp.zeros(1, jnp.int32), jnp.asarray(length, jnp.int32)[None]

    def select(self, q: jax.Array, sparsity: Sparsity) -> Selection:
        """Select pages for every block of queries of ``q[1, S, K, G, H]``, none of which ends a prompt."""
        summaries = update_summaries(new_summaries(self.k, self.table.shape[1]), self.k, self.table, start=self.start,
                                     length=self.length, tokens=q.shape[1])
        return select(q, self.k, summaries, self.table, start=self.start, length=self.length,
                      prompt_length=jnp.full(1, 1 << 30), sparsity=sparsity)

    def attend(self, q: jax.Array, selection: Selection) -> jax.Array:
        """Return the attention output of queries ``q`` over the selected pages."""
        return attend(q, self.k, self.v, self.table, start=self.start, length=self.length, selection=selection)


class Shares(NamedTuple):
    """Shares of full attention that pages get, ``[Q, K, N]``: mean and largest over the queries of each block."""
    mean: jax.Array
    largest: jax.Array


class Recall(NamedTuple):
    """Share of full attention on the selected pages, and related numbers, for every KV head ``[K]``.

    The fields are explained in `sparse_fidelity.Fidelity`.
    """
    recall: jax.Array
    reachable: jax.Array
    needed: jax.Array
    found: jax.Array


def true_shares(q: jax.Array, k: jax.Array, length) -> Shares:
    """Compute the share of full attention that each page gets from each block of queries.

    ``q[1, S, K, G, H]`` and ``k[1, S, K, H]`` have ``length`` real tokens.
    """
    _, tokens, kv_heads, group, dim = q.shape
    width = tokens // PAGE
    blocks = q[0].reshape(width, PAGE, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    blocks = blocks.reshape(width, kv_heads, group * PAGE, dim).astype(jnp.float32) * dim**-0.5
    keys = k[0].astype(jnp.float32)

    def of_block(item):
        index, queries = item
        at = index * PAGE + jnp.tile(jnp.arange(PAGE), group)
        scores = jnp.einsum("krh,skh->krs", queries, keys)
        scores = jnp.where(jnp.arange(tokens) <= at[:, None], scores, -jnp.inf)
        shares = jax.nn.softmax(scores, axis=-1).reshape(kv_heads, -1, width, PAGE).sum(-1)  # [K, R, N]
        real = (at < length)[:, None]
        shares = jnp.where(real, shares, 0)
        return Shares(jnp.sum(shares, axis=1) / jnp.maximum(jnp.sum(real), 1), jnp.max(shares, axis=1))

    return jax.lax.map(of_block, (jnp.arange(width), blocks))


def recall_of(shares: Shares, selection: Selection, sparsity: Sparsity, length) -> Recall:
    """Compute the share of full attention on the selected pages, over blocks of queries that leave pages out.

    It is 1 for a head whose blocks leave out no page.
    """
    width = shares.mean.shape[0]
    mask, count = page_mask(selection, width)[0], selection.count[0]  # [Q, K, N], [Q, K]
    block, pages = jnp.arange(width)[:, None, None], jnp.arange(width)
    counted = (count < block[..., 0] + 1) & (block[..., 0] * PAGE < length)
    best = -jnp.sort(-shares.mean, axis=-1)
    ranked = (pages >= sparsity.sink) & (pages <= block - sparsity.local)
    needed = (shares.largest > NEEDED) & ranked & counted[..., None]
    weight = counted / jnp.maximum(jnp.sum(counted, axis=0), 1)
    whole = ~jnp.any(counted, axis=0)
    recall, reachable = (jnp.where(whole, 1, jnp.sum(jnp.sum(held, axis=-1) * weight, axis=0))
                         for held in (shares.mean * mask, jnp.where(pages < count[..., None], best, 0)))
    return Recall(recall, reachable, jnp.sum(needed, axis=(0, 2)), jnp.sum(needed & mask, axis=(0, 2)))
