"""Selectors: functions that rank pages for a block of queries.

A selector is a function ``(q, view, first, last, wanted) -> (places, rank)``. For queries ``q[B, K, R, H]``, scaled and
float32, it proposes pages ``places`` i32 ``[B, K, C]`` and ranks them, ``rank`` f32 ``[B, K, C]``. It may propose any
page; only pages ``first <= place < last[b]`` count, of which the ``wanted`` best are taken. To add a selector, write
the function and enter it in ``SELECTORS``.

A rank is the log of a share of attention, of a row or over the rows of the block: a row that retrieves something must
not drown among rows that do not.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_kernels.sparse_attention.pyramid import flat, pyramid, reranked
from qwen_kernels.sparse_attention.view import View


def page_shares(scores: jax.Array, view: View) -> jax.Array:
    """Return the log of each page's largest share of a query's attention, ``[B, K, N]``.

    scores: log of the attention weight of each page for each query, ``[B, K, R, N]``.
    """
    exists = jnp.arange(scores.shape[-1]) <= view.own[:, None, None, None]
    scores = jnp.where(exists, scores, -jnp.inf)
    shares = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return jnp.max(jnp.where(view.real[..., None], shares, -jnp.inf), axis=2)


def quest(q, view: View, first, last, wanted):
    """Rank pages by upper bounds of their attention scores, as Quest does (https://arxiv.org/abs/2406.10774).

    No key's product with a query is larger than that of the page's least and greatest values, channel by channel.
    """
    keys = view.keys()
    ends = jnp.concatenate([jnp.min(keys, axis=3), jnp.max(keys, axis=3)], axis=-1)
    signed = jnp.concatenate([jnp.minimum(q, 0), jnp.maximum(q, 0)], axis=-1)
    return view.pages(), page_shares(jnp.einsum("bkrx,bkcx->bkrc", signed, ends), view)


def mean_pooled(q, view: View, first, last, wanted):
    """Rank pages by the product of the block's mean query with the page's mean key.

    InfLLM, and MInference's block-sparse heads, do so.
    """
    pooled = jnp.sum(jnp.where(view.real[..., None], q, 0), axis=2, keepdims=True)
    pooled /= jnp.maximum(jnp.sum(view.real, axis=2), 1)[..., None, None]
    scores = jnp.einsum("bkrh,bknh->bkrn", pooled, view.keys().mean(axis=3))
    return view.pages(), scores[:, :, 0]


STRIDE = 8  # tokens


def strided(q, view: View, first, last, wanted):
    """Rank pages by sums of attention scores along antidiagonals, a stride apart, as XAttention does.

    https://arxiv.org/abs/2503.16428. A single query sees the mean of every stride of keys instead.
    """
    keys = view.keys()
    heads, _, page, dim = keys.shape[1:]
    rows = q.shape[2]
    strided_keys = keys.reshape(*keys.shape[:3], page // STRIDE, STRIDE, dim)
    if rows % page:
        scores = jnp.einsum("bkrh,bknch->bkrnc", q, strided_keys.mean(axis=4))
    else:
        queries = jnp.where(view.real[..., None], q, 0).reshape(len(q), heads, rows // STRIDE, STRIDE, dim)
        scores = jnp.einsum("bkrsh,bkncsh->bkrnc", queries[:, :, :, ::-1], strided_keys) / STRIDE
    exists = jnp.arange(keys.shape[2])[:, None] <= view.own[:, None, None, None, None]
    scores = jnp.where(exists, scores, -jnp.inf)
    shares = jax.nn.softmax(scores.reshape(*scores.shape[:3], -1), axis=-1).reshape(scores.shape)
    return view.pages(), jnp.log(jnp.mean(jnp.sum(shares, axis=-1), axis=2))


def window(q, view: View, first, last, wanted):
    """Rank later pages higher: with the sink, a sliding window (StreamingLLM, https://arxiv.org/abs/2309.17453)."""
    places = view.pages()
    return places, places.astype(jnp.float32)


def oracle(q, view: View, first, last, wanted):
    """Rank pages by their true shares of full attention: the best possible ranks, at full attention's cost."""
    keys = view.keys()
    scores = jnp.einsum("bkrh,bknph->bkrnp", q, keys)
    visible = jnp.arange(keys.shape[2] * keys.shape[3]).reshape(keys.shape[2:4]) <= view.positions[..., None, None]
    return view.pages(), page_shares(jax.nn.logsumexp(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1), view)


SELECTORS: dict[str, Callable] = {"pyramid": pyramid, "reranked": reranked, "quest": quest, "flat": flat,
                                  "mean_pooled": mean_pooled, "strided": strided, "window": window, "oracle": oracle}
