"""Attention with operands of 8-bit floating point (e4m3), as the Hopper kernel's prefill multiplies them.

Not an implementation of ``api.attend``: it says what a prefill in FP8 costs in accuracy, and what the kernel must give.
Queries are rounded after the keys' scales are multiplied into them, each row with a scale of its own; softmax weights
are rounded relative to the largest score up to their page. The bias of 8-bit keys is added to the scores unrounded.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from qwen_kernels.attention.eight_bit import E4M3, MOST, EightBit, EightBitPages
from qwen_kernels.attention.storage import read_rows
from qwen_kernels.sparse_attention.reference import page_mask
from qwen_kernels.sparse_attention.selection import Selection

WEIGHT_BITS = 8  # weights are stored times 2 ** 8: e4m3 reaches from 448 to 2 ** -9, softmax weights from 1 to 0
_LOWEST = -1e30


def to_e4m3(x: jax.Array) -> jax.Array:
    """``x`` rounded to e4m3. Saturates as the GPU does; a plain cast makes NaN of what is beyond 464."""
    return jnp.clip(x.astype(jnp.float32), -MOST["e4m3"], MOST["e4m3"]).astype(E4M3)


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x[..., H]`` in e4m3 and its scale f32 ``[...]``: the largest element of a row becomes the largest e4m3."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
    scale = jnp.where(largest > 0, largest, 1.0) / MOST["e4m3"]
    return to_e4m3(x / scale[..., None]), scale


def log2_queries(q: jax.Array) -> jax.Array:
    """Queries ``[..., H]`` in float32 whose products with keys are exponents of 2."""
    return q.astype(jnp.float32) * (q.shape[-1] ** -0.5 * math.log2(math.e))


def attend(q: jax.Array, k_pages: jax.Array | EightBitPages, v_pages: jax.Array | EightBitPages, page_table: jax.Array,
           start: jax.Array, length: jax.Array, selection: Selection) -> jax.Array:
    """See ``api.attend``. All scores exist in memory. Pages of other types are rounded as they are, with scale 1."""
    tokens, page, width = q.shape[1], k_pages.shape[2], page_table.shape[1]
    k, k_form, k_bias = _rows(k_pages, page_table)
    v, v_form, _ = _rows(v_pages, page_table)
    keys, positions = jnp.arange(k.shape[1]), start[:, None] + jnp.arange(tokens)
    selected = jnp.repeat(page_mask(selection, width), page, axis=3)
    selected = jnp.repeat(selected, tokens // selected.shape[1], axis=1)  # [B, T, K, S]
    visible = (keys <= positions[:, :, None]) & (keys < length[:, None, None])
    visible = (selected & visible[:, :, None])[:, :, :, None]  # [B, T, K, 1, S]

    scaled = log2_queries(q)
    rounded, q_scale = round_rows(scaled * k_form.scale[:, None])
    scores = jnp.einsum("btkgh,bskh->btkgs", rounded.astype(jnp.float32), k) * q_scale[..., None]
    scores += jnp.einsum("btkgh,bskh->btkgs", scaled, k_bias)
    scores = jnp.where(visible, scores, _LOWEST).reshape(*q.shape[:-1], width, page)
    top = lax.cummax(scores.max(axis=-1), axis=4)  # after each page; pages come in the order of their positions
    weights = jnp.exp2(scores - top[..., None]) * visible.reshape(*visible.shape[:-1], width, page)
    decay = jnp.exp2(top - top[..., -1:])  # what the pages that follow make of a page's weights
    total = jnp.sum(weights.sum(axis=-1) * decay, axis=-1)[..., None]

    rounded = to_e4m3(weights * 2.0**WEIGHT_BITS).astype(jnp.float32) * 2.0**-WEIGHT_BITS * decay[..., None]
    v = jnp.where((keys < length[:, None])[..., None, None], v, 0)  # a zero weight must silence even a NaN
    out = jnp.einsum("btkgs,bskh->btkgh", rounded.reshape(*q.shape[:-1], -1), v) / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, out * v_form.scale[:, None] + v_form.bias[:, None], 0).astype(q.dtype)


def _rows(pages: jax.Array | EightBitPages, page_table: jax.Array) -> tuple[jax.Array, EightBit, jax.Array]:
    """What rows hold in e4m3, f32 ``[B, S, K, H]``; how to read it; and the bias at each position, like the first."""
    if not isinstance(pages, EightBitPages):
        shape = pages.shape[1], pages.shape[3]
        form = EightBit(jnp.ones(shape), jnp.zeros(shape))
        rounded = to_e4m3(read_rows(pages, page_table)).astype(jnp.float32)
        return rounded, form, jnp.zeros_like(rounded)
    form = pages.form
    bare = EightBit(jnp.ones_like(form.scale), jnp.zeros_like(form.bias))
    stored = read_rows(EightBitPages(pages.stored, bare), page_table)
    bias = read_rows(EightBitPages(jnp.zeros_like(pages.stored), form), page_table)
    return to_e4m3(stored).astype(jnp.float32), form, bias
