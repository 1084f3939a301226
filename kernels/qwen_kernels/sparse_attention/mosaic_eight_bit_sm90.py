"""Pallas Mosaic GPU form for Hopper that reads 8-bit pages: decode of int8 and e4m3, and prefill in FP8.

A score is (query times the keys' scales) . (stored key) plus the bias's part (`bias_term`), a second small product with
cosines and sines, exact but for their rounding to float16. Softmax weights sum to 1, so the scale and bias of values
are applied to the result, outside of the kernels.

Not yet run on a GPU: lowered for CUDA, and right in the interpreter (``tests/kernels/test_mosaic_eight_bit.py``).

Limits: bfloat16 queries, head dims 64 and 128, pages of keys and values of one type, prefill only of e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qwen_kernels.attention.eight_bit import E4M3, EightBitPages
from qwen_kernels.sparse_attention.eight_bit_decode_sm90 import decode
from qwen_kernels.sparse_attention.eight_bit_prefill_sm90 import prefill
from qwen_kernels.sparse_attention.hopper import TILE
from qwen_kernels.sparse_attention.selection import Selection


@dataclass(frozen=True)
class Tuning:
    """Tuning parameters of a kernel, whose best values depend on the device and the shapes.

    Attributes:
      warpgroups: compute warpgroups of a prefill block, each with the queries of a head of its own.
      stages: pages in the ring of buffers.
      splits: grid blocks that share the pages of a decode row.
    """

    warpgroups: int = 2
    stages: int = 3
    splits: int = 4


def supported(q: jax.Array, k_pages: EightBitPages, v_pages: EightBitPages) -> str | None:
    """Return the reason why the kernels cannot run for queries ``[B, T, K, G, H]`` and these pages, or None."""
    if not (isinstance(k_pages, EightBitPages) and isinstance(v_pages, EightBitPages)):
        return "the 8-bit Hopper kernel takes 8-bit pages"
    if q.dtype != jnp.bfloat16:
        return f"the 8-bit Hopper kernel takes bfloat16 queries, not {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"the 8-bit Hopper kernel takes head dims of 64 and 128, not {q.shape[-1]}"
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (jnp.int8, E4M3):
        types = f"keys of {k_pages.dtype}, values of {v_pages.dtype}"
        return f"the 8-bit Hopper kernel takes int8 or e4m3 pages, not {types}"
    if q.shape[1] % TILE == 0 and k_pages.dtype != E4M3:
        return f"the 8-bit Hopper kernel multiplies e4m3 in a prefill, not {k_pages.dtype}"
    return None


def attend(q: jax.Array, k_pages: EightBitPages, v_pages: EightBitPages, page_table: jax.Array, start: jax.Array,
           length: jax.Array, selection: Selection, tuning: Tuning = Tuning(), interpret=None) -> jax.Array:
    """Compute attention to the selected pages on Hopper GPUs; arguments as in ``api.attend``.

    Positions of a row's last page beyond its length must hold finite values. interpret: parameters of Pallas'
    interpreter; None for a GPU.
    """
    if (reason := supported(q, k_pages, v_pages)) is not None:
        raise ValueError(reason)
    lists = (selection.places, selection.count, selection.dense.astype(jnp.int32), page_table)
    if q.shape[1] > selection.count.shape[1]:
        out = prefill(q, k_pages, v_pages, lists, warpgroups=tuning.warpgroups, stages=tuning.stages,
                      interpret=interpret)
    else:
        out = decode(q, k_pages, v_pages, lists, start, splits=tuning.splits, stages=tuning.stages,
                     interpret=interpret)
    page_format = v_pages.format
    out = out.astype(jnp.float32) * page_format.scale[:, None] + page_format.bias[:, None]
    return jnp.where(length[:, None, None, None, None] > 0, out, 0).astype(q.dtype)
