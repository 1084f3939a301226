"""Pallas kernel for decode with 8-bit pages on Hopper; see `mosaic_eight_bit_sm90` for how scores are computed.

It reads a page once for all query heads of its KV head. Keys and values go from shared memory through registers, where
they become float16 (Mosaic converts e4m3 to nothing else, and it holds e4m3 and int8 exactly), into the tensor core as
the operand that may come from registers. That makes the 64 keys, and then the head's channels, the rows of the product,
and the query heads its columns: 8 of them, where as rows they would be padded to 64. Values are loaded by columns: a
page holds them ``[64, H]``, and the product wants ``[H, 64]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_kernels.attention.eight_bit import EightBitPages, PageFormat
from qwen_kernels.sparse_attention.bias_term import bias_coefficients, divided_by_largest, page_angles
from qwen_kernels.sparse_attention.fp8_operands import log2_queries
from qwen_kernels.sparse_attention.hopper import (
    LOWEST,
    ROWS,
    TILE,
    Warpgroup,
    fill_ring,
    launch,
    listed_pages,
    swizzled,
)

HEADS = 8  # the tensor core's columns come in eights, and so do the query heads of a decode block


class _Refs(NamedTuple):
    """References to the memory of a grid block of the decode kernel, in the order of the kernel's arguments.

    The first twelve are operands in global memory: those of `_operands`, the pages, the lists and ``seen`` of `decode`;
    then come its two results. ``q_tile`` to ``weight_tile`` are buffers in shared memory; the rest are barriers.
    "ready": a copy has arrived; "free": the compute warpgroup has read a slot of the ring.
    """

    q: Any
    terms: Any
    factors: Any
    turns: Any
    table: Any
    k_pages: Any
    v_pages: Any
    places: Any
    count: Any
    dense: Any
    page_table: Any
    seen: Any
    out: Any
    lse: Any
    q_tile: Any
    table_tile: Any
    turn_ring: Any
    k_ring: Any
    v_ring: Any
    turned_tile: Any
    weight_tile: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any


class _Pages(NamedTuple):
    """List of the pages that one grid block attends to.

    Attributes:
      at: index (row, query, KV head) of the query.
      count: number of pages in the list of the query; all splits together.
      place: function from an index in the list to a place in the row.
      first: index in the list of this grid block's first page.
      steps: number of pages of this grid block.
    """

    at: tuple
    count: jax.Array
    place: Callable
    first: jax.Array
    steps: jax.Array


def decode(q: jax.Array, k_pages: EightBitPages, v_pages: EightBitPages, lists: tuple, start: jax.Array, *,
           splits: int, stages: int, interpret) -> jax.Array:
    """Run the decode kernel: return softmax-weighted means of stored values, f32 ``[B, T, K, G, H]``.

    Each block has one query. The caller applies the scale and bias of values.

    lists: places, count, and dense as int32 of a `Selection`, and the page table. splits: number of grid blocks that
    share the pages of a query. stages: number of pages in the ring of buffers.
    """
    rows, tokens, kv_heads, group, dim = q.shape
    heads = pl.cdiv(group, HEADS) * HEADS
    operands = _operands(q, k_pages.format, heads, pages=lists[3].shape[1])
    seen = (start[:, None] + jnp.arange(tokens)) % TILE + 1  # keys of the own page
    on = Warpgroup(interpret)

    def kernel(*refs):
        refs = _Refs(*refs)
        warpgroup, split = lax.axis_index("wg"), lax.axis_index("split")
        at = lax.axis_index("b"), lax.axis_index("block"), lax.axis_index("head")
        pages = _pages_of(refs, at, split, splits)
        pl.when(warpgroup == 1)(lambda: _copy_pages(refs, pages, stages))
        pl.when(warpgroup == 0)(lambda: _attend_heads(refs, pages, split, stages, on))

    shape = (rows, tokens, kv_heads, splits)
    out, lse = launch(
        kernel, interpret, warpgroups=2, grid=(splits, kv_heads, tokens, rows),
        names=("split", "head", "block", "b"),
        out_type=(jax.ShapeDtypeStruct((*shape, dim, heads), jnp.float32),
                  jax.ShapeDtypeStruct((*shape, heads), jnp.float32)),
        scratch_types=_scratch(heads, dim, stages, k_pages.dtype),
    )(*operands, k_pages.stored, v_pages.stored, *lists, seen)
    joined = jnp.sum(out * jax.nn.softmax(lse, axis=3)[..., None, :], axis=3)  # [B, T, K, H, heads]
    return joined.swapaxes(-1, -2)[:, :, :, :group]


def _operands(q: jax.Array, page_format: PageFormat, heads: int, pages: int) -> tuple[jax.Array, ...]:
    """Return the kernel's operands besides the pages: queries, bias coefficients, and RoPE's cosines and sines.

    Returns:
      queries times the keys' scales, f16 ``[B, T, K, heads, H]``;
      coefficients for the cosines and for the sines of a page's beginning, ``[B, T, K, 2, H, heads]``;
      the factors that both are divided by, ``[B, T, K, 2, heads]``;
      cosines and sines of the beginnings of ``pages`` pages, ``[N, 2, H]``;
      cosines and sines within a page, f16 ``[PAGE, H]``.
    """
    scaled = jnp.pad(log2_queries(q), ((0, 0),) * 3 + ((0, heads - q.shape[3]), (0, 0)))
    content, content_factor = divided_by_largest(scaled * page_format.scale[:, None], -1)
    cos, sin = bias_coefficients(scaled, page_format)
    # Rotated to a page's beginning the coefficients are (cos c + sin s, sin c - cos s): two products with c and s.
    terms = jnp.stack([jnp.concatenate([cos, sin], -1), jnp.concatenate([sin, -cos], -1)], -3).swapaxes(-1, -2)
    terms, bias_factor = divided_by_largest(terms, (-3, -2))
    begin, within = page_angles(page_format, pages)
    turns = jnp.stack([jnp.tile(jnp.cos(begin), 2), jnp.tile(jnp.sin(begin), 2)], axis=1)
    table = jnp.concatenate([jnp.cos(within), jnp.sin(within)], axis=-1).astype(jnp.float16)
    return content.astype(jnp.float16), terms, jnp.stack([content_factor, bias_factor], axis=-2), turns, table


def _scratch(heads: int, dim: int, stages: int, stored) -> list:
    """Return a grid block's shared-memory buffers and barriers: ``q_tile`` to ``v_free`` of `_Refs`."""
    half = jnp.float16
    ring = plgpu.SMEM((stages, TILE, dim), stored, transforms=swizzled(stored, dim))
    return [
        plgpu.SMEM((heads, dim), half, transforms=swizzled(half, dim)),
        plgpu.SMEM((TILE, dim), half, transforms=swizzled(half, dim)),
        plgpu.SMEM((stages, 2, dim), jnp.float32), ring, ring,
        plgpu.SMEM((heads, dim), half, transforms=swizzled(half, dim)),
        plgpu.SMEM((heads, TILE), half, transforms=swizzled(half, TILE)),
        plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        *[plgpu.Barrier(num_barriers=stages)] * 3]


def _pages_of(refs: _Refs, at: tuple, split, splits: int) -> _Pages:
    """Return the pages that grid block number ``split`` of ``splits`` attends to for the query ``at``."""
    count, place = listed_pages(at, refs.places, refs.count, refs.dense)
    share = lax.div(count + (splits - 1), jnp.int32(splits))
    first = jnp.minimum(split * share, count)
    return _Pages(at, count, place, first, steps=jnp.minimum(share, count - first))


def _copy_pages(refs: _Refs, pages: _Pages, stages: int) -> None:
    """Copy the queries to shared memory, and keys and values of all pages into the ring of buffers.

    This is the work of the memory warpgroup.
    """
    row, _, head = pages.at
    plgpu.copy_gmem_to_smem(refs.q.at[pages.at], refs.q_tile, refs.q_ready)
    plgpu.copy_gmem_to_smem(refs.table, refs.table_tile, refs.q_ready)

    @fill_ring(pages.steps, stages, refs.k_free, refs.v_free)
    def _(step, slot):
        place = pages.place(pages.first + step)
        page = refs.page_table[row, place]
        plgpu.copy_gmem_to_smem(refs.k_pages.at[page, head], refs.k_ring.at[slot], refs.k_ready.at[slot])
        plgpu.copy_gmem_to_smem(refs.turns.at[place], refs.turn_ring.at[slot], refs.k_ready.at[slot])
        plgpu.copy_gmem_to_smem(refs.v_pages.at[page, head], refs.v_ring.at[slot], refs.v_ready.at[slot])


def _attend_heads(refs: _Refs, pages: _Pages, split, stages: int, on: Warpgroup) -> None:
    """Compute attention of one KV head's query heads to all pages: the compute warpgroup's work."""
    at, (heads, dim) = pages.at, refs.q_tile.shape
    plgpu.barrier_wait(refs.q_ready)
    with_cos, with_sin = (on.load(refs.terms.at[(*at, i)], ROWS, optimized=False) for i in range(2))
    factors = [on.along(on.load(refs.factors.at[(*at, i)], ROWS.reduce(0), optimized=False), (TILE, heads), 1)
               for i in range(2)]

    def step(index, carry, masked: bool):
        acc, top, mass = carry
        slot = lax.rem(index, jnp.int32(stages))
        plgpu.barrier_wait(refs.k_ready.at[slot])
        cos, sin = (on.along(on.load(refs.turn_ring.at[slot, i], ROWS.reduce(1)), (dim, heads), 0) for i in range(2))
        on.store_transposed(refs.turned_tile, with_cos * cos + with_sin * sin)
        keys = on.load(refs.k_ring.at[slot], ROWS).astype(jnp.float16)
        plgpu.commit_smem()
        content, bias = on.products((TILE, heads), (keys, refs.q_tile), (refs.table_tile, refs.turned_tile))
        plgpu.barrier_arrive(refs.k_free.at[slot])
        scores = content * factors[0] + bias * factors[1]
        if masked:
            scores = jnp.where(on.iota(scores.shape, 0) < refs.seen[at[0], at[1]], scores, LOWEST)
        higher = jnp.maximum(top, scores.max(axis=0))
        decay = jnp.exp2(top - higher)
        weights = jnp.exp2(scores - on.along(higher, scores.shape, 1))
        mass = mass * on.along(decay, mass.shape, 1) + weights
        acc = acc * on.along(decay, acc.shape, 1)
        on.store_transposed(refs.weight_tile, weights)
        plgpu.barrier_wait(refs.v_ready.at[slot])
        values = on.load_transposed(refs.v_ring.at[slot])
        plgpu.commit_smem()  # the weights are there; the page's buffer may be filled again
        plgpu.barrier_arrive(refs.v_free.at[slot])
        return acc + on.products((dim, heads), (values, refs.weight_tile))[0], higher, mass

    carry = (on.full((dim, heads), 0, ROWS), on.full((heads,), LOWEST, ROWS.reduce(0)), on.full((TILE, heads), 0, ROWS))
    steps = pages.steps
    own = (steps > 0) & (pages.first + steps == pages.count)  # the list ends with the query's own page
    plain = steps - own.astype(jnp.int32)
    carry = lax.fori_loop(0, plain, lambda i, c: step(i, c, False), carry)
    acc, top, mass = lax.fori_loop(plain, steps, lambda i, c: step(i, c, True), carry)
    total = mass.sum(axis=0)
    total = jnp.where(total > 0, total, 1.0)
    refs.out[(*at, split)] = acc / on.along(total, acc.shape, 1)
    refs.lse[(*at, split)] = (top + jnp.log2(total)) * math.log(2)
