"""Portable XLA form of dense causal attention: one block of queries at a time, whose scores fit the CPU's cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

QUERY_BLOCK = 64  # tokens
MAX_BLOCKS = 16  # of a row; each is traced on its own, so longer rows get longer blocks


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None = None,
                     shared_segment: int | None = None) -> jax.Array:
    """Compute dense causal attention, as ``api.causal_attention`` describes, a block of queries at a time.

    Keys after a block are skipped; scores and softmax are float32.
    """
    rows, length, kv_heads, group, dim = q.shape
    block = max(QUERY_BLOCK, -(-length // MAX_BLOCKS))
    q_bkgth = q.transpose(0, 2, 3, 1, 4)
    k_bksh, v_bksh = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        queries = q_bkgth[:, :, :, start:end].reshape(rows, kv_heads, -1, dim)
        scores = jnp.einsum("bkmh,bksh->bkms", queries, k_bksh[:, :, :end], preferred_element_type=jnp.float32)
        scores = scores.reshape(rows, kv_heads, group, end - start, end) * dim ** -0.5
        visible = (jnp.arange(end)[None] <= jnp.arange(start, end)[:, None])[None]
        if segment_ids is not None:
            visible = visible & _visible_segments(segment_ids[:, start:end], segment_ids[:, :end], shared_segment)
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bkms,bksh->bkmh", weights.reshape(rows, kv_heads, -1, end), v_bksh[:, :, :end],
                           preferred_element_type=jnp.float32)
        blocks.append(mixed.reshape(rows, kv_heads, group, end - start, dim))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).astype(q.dtype)


def _visible_segments(queries: jax.Array, keys: jax.Array, shared_segment: int | None) -> jax.Array:
    """Return which keys each query may see, those of its own segment or the shared one: bool ``[B, T, S]``.

    queries, keys: segment ids i32 ``[B, T]`` and ``[B, S]``.
    """
    visible = queries[:, :, None] == keys[:, None, :]
    return visible if shared_segment is None else visible | (keys == shared_segment)[:, None, :]
