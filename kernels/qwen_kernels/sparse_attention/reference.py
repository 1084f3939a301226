"""Reference form of attention to selected pages: a mask over full attention, with which other forms are compared."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_kernels.attention.storage import read_rows
from qwen_kernels.sparse_attention.selection import Selection


def page_mask(selection: Selection, width: int) -> jax.Array:
    """Return which of a row's first ``width`` pages each block of queries attends to, bool ``[B, Q, K, width]``."""
    listed = jnp.any(selection.places[..., None] == jnp.arange(width), axis=-2)
    before = jnp.arange(width) < selection.count[..., None]
    return jnp.where(selection.dense[..., None], before, listed & (selection.count[..., None] > 0))


def attend(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, selection: Selection, dense_heads: tuple[int, ...] = ()) -> jax.Array:
    """Compute attention to the selected pages, as ``api.attend`` describes, with all scores in memory."""
    tokens, page = q.shape[1], k_pages.shape[2]
    k, v = (read_rows(pages, page_table).astype(jnp.float32) for pages in (k_pages, v_pages))
    keys, positions = jnp.arange(k.shape[1]), start[:, None] + jnp.arange(tokens)
    selected = page_mask(selection, page_table.shape[1])
    selected = jnp.repeat(jnp.repeat(selected, page, axis=3), tokens // selected.shape[1], axis=1)  # [B, T, K, S]
    visible = (keys <= positions[:, :, None]) & (keys < length[:, None, None])
    visible = (selected & visible[:, :, None]).transpose(0, 2, 1, 3)[:, :, None]  # [B, K, 1, T, S]
    scores = jnp.einsum("btkgh,bskh->bkgts", q.astype(jnp.float32), k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1, where=visible)
    weights = jnp.where(jnp.any(visible, axis=-1, keepdims=True), weights, 0)
    v = jnp.where((keys < length[:, None])[..., None, None], v, 0)  # a zero weight must silence even a NaN
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).astype(q.dtype)
