"""Rotary position embedding in the half-rotation form that Qwen2 uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.config import Rope


def rope_tables(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, float32 ``[..., head_dim / 2]``, for integer ``positions[...]``, times YaRN's factor."""
    frequencies, scale = rope.frequencies(head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate ``x[..., H]`` by tables that broadcast against ``[..., H / 2]``, in float32; the dtype stays.

    Channel ``i`` is paired with channel ``i + H / 2`` (Hugging Face's ``rotate_half``).
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
