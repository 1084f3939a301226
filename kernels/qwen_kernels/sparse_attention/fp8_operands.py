"""Attention computed with operands rounded to e4m3 (8-bit floating point), as the Hopper prefill kernel does.

It is no implementation of ``api.attend``: it shows what a prefill in FP8 costs in accuracy, and what the kernel must
return. Queries are rounded after the keys' scales are multiplied into them, each row with a scale of its own; softmax
weights are rounded relative to the largest score up to their page. The bias of 8-bit keys is added to the scores
unrounded.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from qwen_kernels.attention.eight_bit import E4M3, LARGEST, EightBitPages, PageFormat
from qwen_kernels.attention.storage import read_rows
from qwen_kernels.sparse_attention.reference import page_mask
from qwen_kernels.sparse_attention.selection import Selection

WEIGHT_BITS = 8  # weights are stored times 2 ** 8: e4m3 reaches from 448 to 2 ** -9, softmax weights from 1 to 0
_LOWEST = -1e30


def to_e4m3(x: jax.Array) -> jax.Array:
    """Round ``x`` to e4m3, clipped to its range as on a GPU; a plain cast gives NaN beyond 464."""
    return jnp.clip(x.astype(jnp.float32), -LARGEST["e4m3"], LARGEST["e4m3"]).astype(E4M3)


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round ``x[..., H]`` to e4m3 and return it with its scales f32 ``[...]``: a row's largest element becomes 448."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST["e4m3"]
    return to_e4m3(x / scale[..., None]), scale


def log2_queries(q: jax.Array) -> jax.Array:
    """Scale queries ``[..., H]``, in float32, so that their products with keys are softmax exponents of base 2."""
    return q.astype(jnp.float32) * (q.shape[-1] ** -0.5 * math.log2(math.e))


def attend(q: jax.Array, k_pages: jax.Array | EightBitPages, v_pages: jax.Array | EightBitPages, page_table: jax.Array,
           start: jax.Array, length: jax.Array, selection: Selection) -> jax.Array:
    """Compute attention to the selected pages, as ``api.attend`` describes, with operands rounded to e4m3.

    Pages that are not 8-bit are rounded with scale 1.

    All scores exist in memory.
    """
    tokens, page, width = q.shape[1], k_pages.shape[2], page_table.shape[1]
    k, k_format, k_bias = _rows(k_pages, page_table)
    v, v_format, _ = _rows(v_pages, page_table)
    keys, positions = jnp.arange(k.shape[1]), start[:, None] + jnp.arange(tokens)
    selected = jnp.repeat(page_mask(selection, width), page, axis=3)
    selected = jnp.repeat(selected, tokens // selected.shape[1], axis=1)  # [B, T, K, S]
    visible = (keys <= positions[:, :, None]) & (keys < length[:, None, None])
    visible = (selected & visible[:, :, None])[:, :, :, None]  # [B, T, K, 1, S]

    scaled = log2_queries(q)
    rounded, q_scale = round_rows(scaled * k_format.scale[:, None])
    scores = jnp.einsum("btkgh,bskh->btkgs", rounded.astype(jnp.float32), k) * q_scale[..., None]
    scores += jnp.einsum("btkgh,bskh->btkgs", scaled, k_bias)
    scores = jnp.where(visible, scores, _LOWEST).reshape(*q.shape[:-1], width, page)
    top = lax.cummax(scores.max(axis=-1), axis=4)  # after each page; pages come in the order of their positions
    weights = jnp.exp2(scores - top[..., None]) * visible.reshape(*visible.shape[:-1], width, page)
    decay = jnp.exp2(top - top[..., -1:])  # factor by which later pages lower a page's weights
    total = jnp.sum(weights.sum(axis=-1) * decay, axis=-1)[..., None]

    rounded = to_e4m3(weights * 2.0**WEIGHT_BITS).astype(jnp.float32) * 2.0**-WEIGHT_BITS * decay[..., None]
    v = jnp.where((keys < length[:, None])[..., None, None], v, 0)  # a zero weight must silence even a NaN
    out = jnp.einsum("btkgs,bskh->btkgh", rounded.reshape(*q.shape[:-1], -1), v) / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, out * v_format.scale[:, None] + v_format.bias[:, None], 0).astype(q.dtype)


def _rows(pages: jax.Array | EightBitPages, page_table: jax.Array) -> tuple[jax.Array, PageFormat, jax.Array]:
    """Return the stored e4m3 values of rows' pages, f32 ``[B, S, K, H]``, their format, and the biases to be added."""
    if not isinstance(pages, EightBitPages):
        shape = pages.shape[1], pages.shape[3]
        page_format = PageFormat(jnp.ones(shape), jnp.zeros(shape))
        rounded = to_e4m3(read_rows(pages, page_table)).astype(jnp.float32)
        return rounded, page_format, jnp.zeros_like(rounded)
    page_format = pages.format
    bare = PageFormat(jnp.ones_like(page_format.scale), jnp.zeros_like(page_format.bias))
    stored = read_rows(EightBitPages(pages.stored, bare), page_table)
    bias = read_rows(EightBitPages(jnp.zeros_like(pages.stored), page_format), page_table)
    return to_e4m3(stored).astype(jnp.float32), page_format, bias
