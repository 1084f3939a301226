"""Causal attention for training rows of a few hundred tokens on a CPU."""
import jax
import jax.numpy as jnp

QUERY_BLOCK = 64  # tokens: one block's scores stay in cache, which cut the time of the dense form to a third


def blocked_causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [B, T, K, G, H], k and v [B, T, K, H] to [B, T, K, G, H]; keys after a block of queries are not touched."""
    rows, length, kv_heads, group, dim = q.shape
    q_bkgth = (q * dim ** -0.5).transpose(0, 2, 3, 1, 4)
    k_bksh, v_bksh = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        queries = q_bkgth[:, :, :, start:end].reshape(rows, kv_heads, -1, dim)
        scores = jnp.einsum("bkmh,bksh->bkms", queries, k_bksh[:, :, :end])
        scores = scores.reshape(rows, kv_heads, group, end - start, end)
        visible = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).reshape(rows, kv_heads, -1, end)
        mixed = jnp.einsum("bkms,bksh->bkmh", weights, v_bksh[:, :, :end])
        blocks.append(mixed.reshape(rows, kv_heads, group, end - start, dim))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4)
