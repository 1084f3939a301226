"""Pallas kernel for prefill with e4m3 pages on Hopper; see `mosaic_eight_bit_sm90` for how scores are computed.

It multiplies e4m3 with e4m3, twice as fast as 16 bits. The tensor core takes 8-bit operands only with the contracted
axis contiguous, so a warpgroup of its own transposes pages of values, through float16 registers: Mosaic has no
transposition of 8 bits. Sums of FP8 products keep about 14 bits in the tensor core; each page therefore has fresh
accumulators, which are added in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_kernels.attention.eight_bit import E4M3, EightBitPages, PageFormat
from qwen_kernels.sparse_attention.bias_term import bias_coefficients, divided_by_largest, page_angles
from qwen_kernels.sparse_attention.fp8_operands import WEIGHT_BITS, log2_queries, round_rows
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

# Registers of a thread, by its warpgroup's work; summed over the warpgroups of a grid block they are at most 512.
MEMORY_REGISTERS, TRANSPOSE_REGISTERS, MOST_REGISTERS = 40, 64, 232


class _Refs(NamedTuple):
    """References to the memory of a grid block of the prefill kernel, in the order of the kernel's arguments.

    The first ten are operands in global memory: those of `_operands`, the pages, and the lists of `prefill`; then comes
    its result. ``q_tiles`` to ``out_tiles`` are buffers in shared memory; the rest are barriers. "ready": a copy has
    arrived, or a page of values is transposed; "free": all readers have read a slot of the ring.
    """

    q: Any
    terms: Any
    factors: Any
    table: Any
    k_pages: Any
    v_pages: Any
    places: Any
    count: Any
    dense: Any
    page_table: Any
    out: Any
    q_tiles: Any
    term_tiles: Any
    k_ring: Any
    table_ring: Any
    v_ring: Any
    turned_ring: Any
    weight_tiles: Any
    out_tiles: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    turned_ready: Any
    k_free: Any
    v_free: Any
    turned_free: Any


class _Pages(NamedTuple):
    """List of the pages that one grid block attends to.

    Attributes:
      at: index (row, block of queries, KV head) of the queries.
      steps: number of pages.
      place: function from an index in the list to a place in the row.
    """

    at: tuple
    steps: jax.Array
    place: Callable


def prefill(q: jax.Array, k_pages: EightBitPages, v_pages: EightBitPages, lists: tuple, *, warpgroups: int,
            stages: int, interpret) -> jax.Array:
    """Run the prefill kernel: return softmax-weighted means of stored values, f16 ``[B, T, K, G, H]``.

    Each block has 64 queries. The caller applies the scale and bias of values.

    lists: places, count, and dense as int32 of a `Selection`, and the page table. warpgroups: number of compute
    warpgroups of a grid block, each with the queries of a head of its own. stages: number of pages in the ring of
    buffers.
    """
    rows, tokens, kv_heads, group, dim = q.shape
    computing = min(warpgroups, group)
    operands = _operands(q, k_pages.format, pages=lists[3].shape[1])
    on = Warpgroup(interpret)

    def kernel(*refs):
        refs = _Refs(*refs)
        warpgroup, tile_group = lax.axis_index("wg"), lax.axis_index("tile")
        at = lax.axis_index("b"), lax.axis_index("block"), lax.axis_index("head")
        pages = _Pages(at, *listed_pages(at, refs.places, refs.count, refs.dense))
        pl.when(warpgroup == computing)(lambda: _copy_pages(refs, pages, stages))
        pl.when(warpgroup == computing + 1)(lambda: _transpose_values(refs, pages, stages, on))

        @pl.when(warpgroup < computing)
        def _compute():
            left = (512 - MEMORY_REGISTERS - TRANSPOSE_REGISTERS) // computing
            plgpu.set_max_registers(min(MOST_REGISTERS, left // 8 * 8), action="increase")
            tile = jnp.minimum(tile_group * computing + warpgroup, group - 1)  # a surplus repeats the last
            _attend_tile(refs, pages, warpgroup, (*at, tile), stages=stages, on=on)

    out = launch(
        kernel, interpret, warpgroups=computing + 2, names=("tile", "head", "block", "b"),
        grid=(pl.cdiv(group, computing), kv_heads, tokens // TILE, rows),
        out_type=jax.ShapeDtypeStruct(operands[0].shape, jnp.float16),
        scratch_types=_scratch(computing, stages, dim),
    )(*operands, k_pages.stored, v_pages.stored, *lists)
    return out.transpose((0, 1, 4, 2, 3, 5)).reshape(q.shape)


def _operands(q: jax.Array, page_format: PageFormat, pages: int) -> tuple[jax.Array, ...]:
    """Return the kernel's operands besides the pages: queries, bias coefficients, and RoPE's cosines and sines.

    Returns:
      queries times the keys' scales, e4m3 ``[B, Q, K, G, TILE, H]``;
      coefficients for the cosines and sines, f16 of the same shape;
      the factors that both are divided by, ``[B, Q, K, G, 2, TILE]``;
      cosines and sines of all positions of ``pages`` pages, f16 ``[N, TILE, H]``: as many bytes as a row of keys and
      values, but the same for all rows, heads and layers.
    """
    rows, tokens, kv_heads, group, dim = q.shape
    tiles = q.reshape((rows, tokens // TILE, TILE, kv_heads, group, dim))
    scaled = log2_queries(tiles)
    content, content_factor = round_rows(scaled * page_format.scale[:, None])
    terms, bias_factor = divided_by_largest(jnp.concatenate(bias_coefficients(scaled, page_format), -1), -1)
    factors = jnp.stack([content_factor, bias_factor], axis=-2)  # [B, Q, TILE, K, 2, G]
    content, terms = (x.transpose((0, 1, 3, 4, 2, 5)) for x in (content, terms.astype(jnp.float16)))
    factors = factors.transpose((0, 1, 3, 5, 4, 2))
    begin, within = page_angles(page_format, pages)
    (c, s), (cos, sin) = ((jnp.cos(x), jnp.sin(x)) for x in (begin[:, None], within))
    table = jnp.concatenate([c * cos - s * sin, c * sin + s * cos], axis=-1).astype(jnp.float16)
    return content, terms, factors, table


def _scratch(computing: int, stages: int, dim: int) -> list:
    """Return a grid block's shared-memory buffers and barriers: ``q_tiles`` to ``turned_free`` of `_Refs`."""
    def buffers(count: tuple[int, ...], shape: tuple[int, int], dtype, columns: int | None = None):
        return plgpu.SMEM((*count, *shape), dtype, transforms=swizzled(dtype, columns or shape[1]))

    half, page, ring = jnp.float16, (TILE, dim), (stages,)
    return [
        buffers((computing,), page, E4M3), buffers((computing,), page, half), buffers(ring, page, E4M3),
        buffers(ring, page, half), buffers(ring, page, E4M3, TILE), buffers(ring, (dim, TILE), E4M3),
        buffers((computing, 2), (TILE, TILE), E4M3), buffers((computing,), page, half),
        plgpu.Barrier(num_arrivals=2, num_barriers=computing), plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages), plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages)]


def _copy_pages(refs: _Refs, pages: _Pages, stages: int) -> None:
    """Copy keys and values of all pages from global memory into the ring of buffers: the memory warpgroup's work."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    row, _, head = pages.at

    @fill_ring(pages.steps, stages, refs.k_free, refs.v_free)
    def _(step, slot):
        place = pages.place(step)
        page = refs.page_table[row, place]
        plgpu.copy_gmem_to_smem(refs.k_pages.at[page, head], refs.k_ring.at[slot], refs.k_ready.at[slot])
        plgpu.copy_gmem_to_smem(refs.table.at[place], refs.table_ring.at[slot], refs.k_ready.at[slot])
        plgpu.copy_gmem_to_smem(refs.v_pages.at[page, head], refs.v_ring.at[slot], refs.v_ready.at[slot])


def _transpose_values(refs: _Refs, pages: _Pages, stages: int, on: Warpgroup) -> None:
    """Transpose each page's values from the ring of buffers into a second ring: the work of one warpgroup."""
    plgpu.set_max_registers(TRANSPOSE_REGISTERS, action="decrease")

    @fill_ring(pages.steps, stages, refs.turned_free)
    def _(step, slot):
        plgpu.barrier_wait(refs.v_ready.at[slot])
        for half in range(refs.v_ring.shape[-1] // TILE):
            channels = pl.ds(half * TILE, TILE)
            values = on.load_transposed(refs.v_ring.at[slot, :, channels])
            refs.turned_ring[slot, channels] = values.astype(E4M3)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.v_free.at[slot])
        plgpu.barrier_arrive(refs.turned_ready.at[slot])


def _attend_tile(refs: _Refs, pages: _Pages, warpgroup, at: tuple, *, stages: int, on: Warpgroup) -> None:
    """Compute attention to all pages for the 64 queries of one query head: a compute warpgroup's work.

    at: index (row, block of queries, KV head, query head) of the tile.
    """
    queries, terms = refs.q_tiles.at[warpgroup], refs.term_tiles.at[warpgroup]
    steps, dim = pages.steps, refs.q.shape[-1]
    plgpu.copy_gmem_to_smem(refs.q.at[at], queries, refs.q_ready.at[warpgroup])
    plgpu.copy_gmem_to_smem(refs.terms.at[at], terms, refs.q_ready.at[warpgroup])
    plgpu.barrier_wait(refs.q_ready.at[warpgroup])
    factors = [on.load(refs.factors.at[(*at, i)], ROWS.reduce(1), optimized=False) for i in range(2)]

    def step(index, carry, masked: bool):
        acc, top, total = carry
        slot = lax.rem(index, jnp.int32(stages))
        plgpu.barrier_wait(refs.k_ready.at[slot])
        content, bias = on.products((TILE, TILE), (queries, refs.k_ring.at[slot]), (terms, refs.table_ring.at[slot]))
        plgpu.barrier_arrive(refs.k_free.at[slot])
        scores = content * on.along(factors[0], content.shape, 0) + bias * on.along(factors[1], bias.shape, 0)
        if masked:
            scores = jnp.where(on.iota(scores.shape, 1) <= on.iota(scores.shape, 0), scores, LOWEST)
        higher = jnp.maximum(top, scores.max(axis=1))
        decay = jnp.exp2(top - higher)
        weights = jnp.exp2(scores - on.along(higher, scores.shape, 0))
        total = total * decay + weights.sum(axis=1)
        # Two buffers: a warp may be here before another's product with the last weights is done.
        rounded = refs.weight_tiles.at[warpgroup, lax.rem(index, jnp.int32(2))]
        rounded[...] = (weights * 2.0**WEIGHT_BITS).astype(E4M3)
        plgpu.commit_smem()
        plgpu.barrier_wait(refs.turned_ready.at[slot])
        part, = on.products((TILE, dim), (rounded, refs.turned_ring.at[slot]))
        plgpu.barrier_arrive(refs.turned_free.at[slot])
        return acc * on.along(decay, acc.shape, 0) + part, higher, total

    carry = (on.full((TILE, dim), 0, ROWS), on.full((TILE,), LOWEST, ROWS.reduce(1)),
             on.full((TILE,), 0, ROWS.reduce(1)))
    plain = jnp.maximum(steps - 1, 0)
    carry = lax.fori_loop(0, plain, lambda i, c: step(i, c, False), carry)
    acc, _, total = lax.fori_loop(plain, steps, lambda i, c: step(i, c, True), carry)
    total = jnp.where(total > 0, total, 1.0) * 2.0**WEIGHT_BITS
    out = refs.out_tiles.at[warpgroup]
    out[...] = (acc / on.along(total, acc.shape, 0)).astype(jnp.float16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, refs.out.at[at])
    plgpu.wait_smem_to_gmem(0)
