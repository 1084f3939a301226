"""Pallas Mosaic GPU form for Hopper: one kernel for sparse and dense, prefill and decode.

A block of the grid holds tiles of 64 query rows of one KV head, one per compute warpgroup. A memory warpgroup reads
the list of pages and copies two at a time into a ring of buffers (TMA); the compute warpgroups multiply (wgmma) and
keep an online softmax in registers. Lists ascend, so only the last pair of pages can need a mask. In a prefill a tile
is the 64 queries of a page for one query head; in decode it is all query heads of a row, padded, and the pages are
split over several grid blocks whose results are joined afterwards.

Not yet run on a GPU: lowered for CUDA, and right in the interpreter (``tests/kernels/test_mosaic.py``).

Limits: bfloat16, head dims 64 and 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
from qwen_kernels.sparse_attention.selection import Selection

PAIR = 2  # pages that are multiplied at once


@dataclass(frozen=True)
class Tuning:
    """Tuning parameters of a kernel, whose best values depend on the device and the shapes.

    Attributes:
      warpgroups: compute warpgroups of a grid block, each with a tile of its own.
      stages: pairs of pages in the ring of buffers.
      splits: grid blocks that share the pages of a decode row.
    """

    warpgroups: int = 2
    stages: int = 2
    splits: int = 4


def supported(q: jax.Array) -> str | None:
    """Return the reason why the kernel cannot run for queries ``[B, T, K, G, H]``, or None if it can."""
    if q.dtype != jnp.bfloat16:
        return f"the Hopper kernel takes bfloat16, not {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"the Hopper kernel takes head dims of 64 and 128, not {q.shape[-1]}"
    return None


def attend(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, selection: Selection, tuning: Tuning = Tuning(), interpret=None) -> jax.Array:
    """Compute attention to the selected pages on Hopper GPUs; arguments as in ``api.attend``.

    Positions of a row's last page beyond its length must hold finite values. interpret: parameters of Pallas'
    interpreter; None for a GPU.
    """
    if (reason := supported(q)) is not None:
        raise ValueError(reason)
    rows, tokens, kv_heads, group, dim = q.shape
    blocks = selection.count.shape[1]
    run = partial(_run, k_pages=k_pages, v_pages=v_pages, stages=tuning.stages, interpret=interpret,
                  lists=(selection.places, selection.count, selection.dense.astype(jnp.int32), page_table))
    if tokens > blocks:  # prefill: a tile for every query head
        tiles = q.reshape((rows, blocks, TILE, kv_heads, group, dim)).transpose((0, 1, 3, 4, 2, 5))
        out, _ = run(tiles, seen=jnp.full((rows, blocks), -1, jnp.int32), splits=1,
                     warpgroups=min(tuning.warpgroups, group))
        return out[:, :, :, :, 0].transpose((0, 1, 4, 2, 3, 5)).reshape(q.shape).astype(q.dtype)
    # Decode: a tile holds the query heads; keys up to the query's own position are visible to all of them.
    tiles = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, TILE - group), (0, 0)))[:, :, :, None]
    seen = (start[:, None] + jnp.arange(tokens)) % TILE + 1  # of the own page
    out, lse = run(tiles, seen=seen, splits=tuning.splits, warpgroups=1)
    weights = jax.nn.softmax(lse[:, :, :, 0], axis=3)  # [B, Q, K, splits, TILE]
    joined = jnp.sum(out[:, :, :, 0] * weights[..., None], axis=3)[:, :, :, :group]
    return jnp.where(length[:, None, None, None, None] > 0, joined, 0).astype(q.dtype)


class _Refs(NamedTuple):
    """References to the memory of a grid block of the kernel, in the order of the kernel's arguments.

    The first eight are the operands of `_run` in global memory, then come its two results. ``q_tiles`` to ``lse_tiles``
    are buffers in shared memory; the rest are barriers. "ready": a copy has arrived; "free": all compute warpgroups
    have read a slot of the ring.
    """

    tiles: Any
    k_pages: Any
    v_pages: Any
    places: Any
    count: Any
    dense: Any
    page_table: Any
    seen: Any
    out: Any
    lse: Any
    q_tiles: Any
    k_ring: Any
    v_ring: Any
    out_tiles: Any
    lse_tiles: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any


class _Pages(NamedTuple):
    """List of the pages that one grid block attends to.

    Attributes:
      at: index (row, block of queries, KV head) of the queries.
      count: number of pages in the list of the queries; all splits together.
      pairs: number of pairs of pages in it, the last of which may be half filled.
      place: function from an index in the list to a place in the row.
      first: the first pair of this grid block.
      steps: number of pairs of this grid block.
    """

    at: tuple
    count: jax.Array
    pairs: jax.Array
    place: Callable
    first: jax.Array
    steps: jax.Array


def _run(tiles, k_pages, v_pages, lists, seen, *, warpgroups: int, splits: int, stages: int, interpret):
    """Launch the kernel on query tiles ``[B, Q, K, N, 64, H]``: return attention's output and log-sum-exp.

    Returns: out ``[B, Q, K, N, splits, 64, H]`` and the log-sum-exp of the scores in float32.
    ``out`` is float32 if it is split, and else has the tiles' dtype, for which shared memory has room.

    lists: places, count, and dense as int32 of a `Selection`, and the page table. seen: i32 ``[B, Q]``, the number of
    keys of the own page that all query rows see; with -1, query row i sees ``i + 1``.
    """
    rows, blocks, kv_heads, tiles_per_head, _, dim = tiles.shape
    out_dtype = jnp.float32 if splits > 1 else tiles.dtype

    def kernel(*refs):
        refs = _Refs(*refs)
        warpgroup, split, tile_group = lax.axis_index("wg"), lax.axis_index("split"), lax.axis_index("tile")
        at = lax.axis_index("b"), lax.axis_index("block"), lax.axis_index("head")
        pages = _pages_of(refs, at, split, splits)
        pl.when(warpgroup == warpgroups)(lambda: _copy_pages(refs, pages, stages))

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            tile = jnp.minimum(tile_group * warpgroups + warpgroup, tiles_per_head - 1)  # a surplus repeats the last
            _attend_tile(refs, pages, warpgroup, (*at, tile), split, stages=stages, interpret=interpret)

    shape = (rows, blocks, kv_heads, tiles_per_head, splits, TILE)
    return launch(
        kernel, interpret, warpgroups=warpgroups + 1, names=("split", "tile", "head", "block", "b"),
        grid=(splits, pl.cdiv(tiles_per_head, warpgroups), kv_heads, blocks, rows),
        out_type=(jax.ShapeDtypeStruct((*shape, dim), out_dtype), jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types=_scratch(warpgroups, stages, dim, tiles.dtype, out_dtype),
    )(tiles, k_pages, v_pages, *lists, seen)


def _scratch(warpgroups: int, stages: int, dim: int, dtype, out_dtype) -> list:
    """Return a grid block's shared-memory buffers and barriers: ``q_tiles`` to ``v_free`` of `_Refs`."""
    tiled = swizzled(dtype, dim)
    ring = (stages, PAIR * TILE, dim)
    return [
        plgpu.SMEM((warpgroups, TILE, dim), dtype, transforms=tiled),
        plgpu.SMEM(ring, dtype, transforms=tiled),
        plgpu.SMEM(ring, dtype, transforms=tiled),
        plgpu.SMEM((warpgroups, TILE, dim), out_dtype, transforms=swizzled(out_dtype, dim)),
        plgpu.SMEM((warpgroups, TILE), jnp.float32),
        plgpu.Barrier(num_barriers=warpgroups),
        plgpu.Barrier(num_arrivals=PAIR, num_barriers=stages),
        plgpu.Barrier(num_arrivals=PAIR, num_barriers=stages),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    ]


def _pages_of(refs: _Refs, at: tuple, split, splits: int) -> _Pages:
    """Return the pages that grid block number ``split`` of ``splits`` attends to for the queries ``at``."""
    count, place = listed_pages(at, refs.places, refs.count, refs.dense)
    pairs = lax.div(count + (PAIR - 1), jnp.int32(PAIR))
    share = lax.div(pairs + (splits - 1), jnp.int32(splits))
    first = jnp.minimum(split * share, pairs)
    return _Pages(at, count, pairs, place=place, first=first, steps=jnp.minimum(share, pairs - first))


def _copy_pages(refs: _Refs, pages: _Pages, stages: int) -> None:
    """Copy keys and values of all pages from global memory into the ring of buffers: the memory warpgroup's work."""
    plgpu.set_max_registers(40, action="decrease")
    row, _, head = pages.at

    @fill_ring(pages.steps, stages, refs.k_free, refs.v_free)
    def _(step, slot):
        for half in range(PAIR):
            index = jnp.minimum((pages.first + step) * PAIR + half, pages.count - 1)  # an odd last page is copied twice
            page = refs.page_table[row, pages.place(index)]
            part = pl.ds(half * TILE, TILE)
            plgpu.copy_gmem_to_smem(refs.k_pages.at[page, head], refs.k_ring.at[slot, part], refs.k_ready.at[slot])
            plgpu.copy_gmem_to_smem(refs.v_pages.at[page, head], refs.v_ring.at[slot, part], refs.v_ready.at[slot])


def _attend_tile(refs: _Refs, pages: _Pages, warpgroup, at: tuple, split, *, stages: int, interpret) -> None:
    """Compute attention to all pages for one tile of 64 query rows: a compute warpgroup's work.

    at: index (row, block of queries, KV head, tile) of the tile.
    """
    on, (row, block, *_) = Warpgroup(interpret), at
    queries, dim = refs.q_tiles.at[warpgroup], refs.tiles.shape[-1]
    plgpu.copy_gmem_to_smem(refs.tiles.at[at], queries, refs.q_ready.at[warpgroup])
    plgpu.barrier_wait(refs.q_ready.at[warpgroup])
    scale = dim**-0.5 * math.log2(math.e)

    def step(index, carry, masked: bool):
        acc, top, total = carry
        slot = lax.rem(index, jnp.int32(stages))
        plgpu.barrier_wait(refs.k_ready.at[slot])
        scores = on.products((TILE, PAIR * TILE), (queries, refs.k_ring.at[slot]))[0] * scale
        plgpu.barrier_arrive(refs.k_free.at[slot])
        if masked:
            # The own page is the list's last; in an odd list it stands in the first half, and again after it.
            query, column = on.iota(scores.shape, 0), on.iota(scores.shape, 1)
            own = (pages.count - 1 - (pages.first + index) * PAIR) * TILE  # its first column
            seen = refs.seen[row, block]
            last = jnp.where(seen < 0, query, seen - 1)
            scores = jnp.where(column - own <= last, scores, LOWEST)
        higher = jnp.maximum(top, scores.max(axis=1))
        decay = jnp.exp2(top - higher)
        weights = jnp.exp2(scores - on.along(higher, scores.shape, 0))
        total = total * decay + weights.sum(axis=1)
        acc = acc * on.along(decay, acc.shape, 0)
        plgpu.barrier_wait(refs.v_ready.at[slot])
        acc = on.add_product(acc, weights, refs.v_ring.at[slot])
        plgpu.barrier_arrive(refs.v_free.at[slot])
        return acc, higher, total

    carry = (on.full((TILE, dim), 0, ROWS), on.full((TILE,), LOWEST, ROWS.reduce(1)),
             on.full((TILE,), 0, ROWS.reduce(1)))
    steps = pages.steps
    plain = jnp.where(pages.first + steps == pages.pairs, jnp.maximum(steps - 1, 0), steps)
    carry = lax.fori_loop(0, plain, lambda i, c: step(i, c, False), carry)
    acc, top, total = lax.fori_loop(plain, steps, lambda i, c: step(i, c, True), carry)
    total = jnp.where(total > 0, total, 1.0)
    out, lse = refs.out_tiles.at[warpgroup], refs.lse_tiles.at[warpgroup]
    out[...] = (acc / on.along(total, acc.shape, 0)).astype(out.dtype)
    lse[...] = (top + jnp.log2(total)) * math.log(2)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, refs.out.at[(*at, split)])
    plgpu.copy_smem_to_gmem(lse, refs.lse.at[(*at, split)])
    plgpu.wait_smem_to_gmem(0)
