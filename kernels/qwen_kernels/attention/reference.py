"""Reference form of dense and paged attention: the simplest code, with which the other forms are compared."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.attention.storage import read_rows


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None = None,
                     shared_segment: int | None = None) -> jax.Array:
    """Compute dense causal attention, as ``api.causal_attention`` describes, with all T x T scores in memory.

    Scores and softmax are float32.
    """
    length = q.shape[1]
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = mask & (same if shared_segment is None else same | (segment_ids == shared_segment)[:, None, :])
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def paged_attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
                    start: jax.Array, length: jax.Array) -> jax.Array:
    """Compute attention over a paged cache, as ``api.paged_attention`` describes, from every page of the table."""
    tokens = q.shape[1]
    k, v = (read_rows(pages, page_table) for pages in (k_pages, v_pages))
    positions = start[:, None] + jnp.arange(tokens)
    visible = jnp.arange(k.shape[1])[None, None] <= positions[:, :, None]
    visible &= (jnp.arange(k.shape[1])[None] < length[:, None])[:, None]
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0).astype(v.dtype)
    # Unwritten positions may hold anything; a zero weight must silence even a NaN.
    v = jnp.where((jnp.arange(v.shape[1])[None] < length[:, None])[..., None, None], v, 0)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
