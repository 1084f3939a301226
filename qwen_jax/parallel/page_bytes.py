"""Sizes in bytes of a page of the key-value cache. The planner predicts and the engine allocates with them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from qwen_kernels.page import PAGE
from qwen_kernels.sparse_attention import nodes_per_page

from qwen_jax.config import ModelConfig


def kv_page_bytes(config: ModelConfig, dtype, kv_cache: Sequence[str | None]) -> int:
    """Return the bytes of one cache page: the keys and values of ``PAGE`` tokens in the layers of ``kv_cache``.

    kv_cache: for each layer, its 8-bit element type, or None for ``dtype``.
    """
    item_bytes = sum(1 if kind else jnp.dtype(dtype).itemsize for kind in kv_cache)
    return 2 * PAGE * item_bytes * config.num_kv_heads * config.head_dim


def summary_page_bytes(config: ModelConfig, dtype, num_layers: int, width: int) -> int:
    """Return the bytes of one page's key summaries, by which sparse attention selects pages.

    width: largest number of pages of a row; 0 without sparse attention.
    """
    nodes = nodes_per_page(width) if width else 0
    return num_layers * 2 * nodes * jnp.dtype(dtype).itemsize * config.num_kv_heads * config.head_dim
