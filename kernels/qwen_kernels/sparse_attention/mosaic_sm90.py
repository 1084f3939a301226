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
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_kernels.sparse_attention.selection import Selection

TILE = 64  # query rows of a warpgroup, and tokens of a page
PAIR = 2   # pages that are multiplied at once
_LOWEST = -1e30  # finite: exp2 of a difference of two of them is 1, not NaN


@dataclass(frozen=True)
class Tuning:
    """What may differ between devices and shapes."""

    warpgroups: int = 2  # compute warpgroups, each with a tile of its own
    stages: int = 2      # pairs of pages under way
    splits: int = 4      # grid blocks that share the pages of a decode row


def supported(q: jax.Array) -> str | None:
    """Why the kernel cannot run for queries ``[B, T, K, G, H]``; None if it can."""
    if q.dtype != jnp.bfloat16:
        return f"the Hopper kernel takes bfloat16, not {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"the Hopper kernel takes head dims of 64 and 128, not {q.shape[-1]}"
    return None


def attend(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, start: jax.Array,
           length: jax.Array, selection: Selection, tuning: Tuning = Tuning(), interpret=None) -> jax.Array:
    """See ``api.attend``. Slots of a row's last page beyond its length must hold finite values."""
    if (reason := supported(q)) is not None:
        raise ValueError(reason)
    rows, tokens, kv_heads, group, dim = q.shape
    blocks = selection.count.shape[1]
    meta = (selection.places, selection.count, selection.dense.astype(jnp.int32), page_table)
    if tokens > blocks:  # prefill: a tile for every query head
        tiles = q.reshape(rows, blocks, TILE, kv_heads, group, dim).transpose(0, 1, 3, 4, 2, 5)
        heads = min(tuning.warpgroups, group)
        out, _ = _run(tiles, k_pages, v_pages, meta, jnp.full((rows, blocks), -1, jnp.int32), heads, 1, tuning.stages,
                      interpret)
        return out[:, :, :, :, 0].transpose(0, 1, 4, 2, 3, 5).reshape(q.shape).astype(q.dtype)
    # Decode: a tile holds the query heads; keys up to the query's own position are visible to all of them.
    tiles = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, TILE - group), (0, 0)))[:, :, :, None]
    seen = (start[:, None] + jnp.arange(tokens)) % TILE + 1  # of the own page
    out, lse = _run(tiles, k_pages, v_pages, meta, seen, 1, tuning.splits, tuning.stages, interpret)
    weights = jax.nn.softmax(lse[:, :, :, 0], axis=3)  # [B, Q, K, splits, TILE]
    joined = jnp.sum(out[:, :, :, 0] * weights[..., None], axis=3)[:, :, :, :group]
    return jnp.where(length[:, None, None, None, None] > 0, joined, 0).astype(q.dtype)


def _run(tiles, k_pages, v_pages, meta, seen, warpgroups: int, splits: int, stages: int, interpret):
    """Attention of ``tiles[B, Q, K, N, 64, H]``: out ``[B, Q, K, N, splits, 64, H]`` and its log-sum-exp in float32.

    Parts of a result are float32; a whole one, which shared memory has less room for, has the tiles' dtype.

    seen: i32 ``[B, Q]``, keys of the own page that all rows see; -1 for as many as the row's number says.
    """
    rows, blocks, kv_heads, per_head, _, dim = tiles.shape
    dtype = tiles.dtype
    out_dtype = jnp.float32 if splits > 1 else dtype
    steps_dtype = jnp.int32

    def kernel(q_ref, k_ref, v_ref, places_ref, count_ref, dense_ref, table_ref, seen_ref, out_ref, lse_ref,
               q_smem, k_smem, v_smem, out_smem, lse_smem, q_bar, k_bar, v_bar, k_free, v_free):
        wg = lax.axis_index("wg")
        split, group_tile = lax.axis_index("split"), lax.axis_index("tile")
        b, block, head = lax.axis_index("b"), lax.axis_index("block"), lax.axis_index("head")
        count, dense = count_ref[b, block, head], dense_ref[b, block, head]
        pairs = lax.div(count + (PAIR - 1), steps_dtype(PAIR))
        share = lax.div(pairs + (splits - 1), steps_dtype(splits))
        begin = jnp.minimum(split * share, pairs)
        steps = jnp.minimum(share, pairs - begin)

        def place(index):
            listed = places_ref[b, block, head, jnp.minimum(index, places_ref.shape[3] - 1)]
            return jnp.where(dense > 0, index, listed)

        @pl.when(wg == warpgroups)
        def _memory():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, steps_dtype(stages))

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])

                for half in range(PAIR):
                    index = jnp.minimum((begin + step) * PAIR + half, count - 1)  # an odd one out is copied twice
                    page = table_ref[b, place(index)]
                    here = pl.ds(half * TILE, TILE)
                    plgpu.copy_gmem_to_smem(k_ref.at[page, head], k_smem.at[slot, here], k_bar.at[slot])
                    plgpu.copy_gmem_to_smem(v_ref.at[page, head], v_smem.at[slot, here], v_bar.at[slot])

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _(step):  # nothing is left in the ring when the block ends
                slot = lax.rem(step, steps_dtype(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        @pl.when(wg < warpgroups)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            tile = jnp.minimum(group_tile * warpgroups + wg, per_head - 1)  # one too many repeats the last
            mine = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, block, head, tile], mine, q_bar.at[wg])
            plgpu.barrier_wait(q_bar.at[wg])
            layout = plgpu.Layout.WGMMA
            scale = dim**-0.5 * math.log2(math.e)

            def numbered(axis):
                shape = (TILE, PAIR * TILE)
                if interpret:  # the interpreter has no layouts
                    return lax.broadcasted_iota(jnp.int32, shape, axis)
                return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

            def step(index, carry, masked: bool):
                acc, top, total = carry
                slot = lax.rem(index, steps_dtype(stages))
                plgpu.barrier_wait(k_bar.at[slot])

                def multiply(acc_ref):
                    plgpu.wgmma(acc_ref, mine, k_smem.at[slot].transpose((1, 0)))
                    return acc_ref[...]

                if interpret is None:
                    scores = pl.run_scoped(multiply, plgpu.ACC((TILE, PAIR * TILE), jnp.float32)) * scale
                else:  # the interpreter knows no transposed references
                    scores = jnp.dot(mine[...], k_smem[slot].T, preferred_element_type=jnp.float32) * scale
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    # The own page is the list's last; in an odd list it stands in the first half, and again after it.
                    row, column = numbered(0), numbered(1)
                    own = (count - 1 - (begin + index) * PAIR) * TILE  # its first column
                    fixed = seen_ref[b, block]
                    last = jnp.where(fixed < 0, row, fixed - 1)
                    scores = jnp.where(column - own <= last, scores, _LOWEST)
                higher = jnp.maximum(top, scores.max(axis=1))
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, [0]))
                total = total * decay + weights.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                plgpu.barrier_wait(v_bar.at[slot])

                if interpret is None:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights.astype(dtype), v_smem.at[slot]))(
                        plgpu.ACC.init(acc))
                else:  # nor wgmma with an operand in registers
                    acc += jnp.dot(weights.astype(dtype), v_smem[slot], preferred_element_type=jnp.float32)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, higher, total

            def filled(shape, value, layout):
                array = jnp.full(shape, value, jnp.float32)
                return array if interpret else plgpu.layout_cast(array, layout)

            carry = (filled((TILE, dim), 0, layout), filled((TILE,), _LOWEST, layout.reduce(1)),
                     filled((TILE,), 0, layout.reduce(1)))
            plain = jnp.where(begin + steps == pairs, jnp.maximum(steps - 1, 0), steps)
            carry = lax.fori_loop(0, plain, lambda i, c: step(i, c, False), carry)
            acc, top, total = lax.fori_loop(plain, steps, lambda i, c: step(i, c, True), carry)
            safe = jnp.where(total > 0, total, 1.0)
            out_smem.at[wg][...] = (acc / lax.broadcast_in_dim(safe, acc.shape, [0])).astype(out_dtype)
            lse_smem.at[wg][...] = (top + jnp.log2(safe)) * math.log(2)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, block, head, tile, split])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, block, head, tile, split])
            plgpu.wait_smem_to_gmem(0)

    tiled = _swizzled(dtype, dim)
    ring = (stages, PAIR * TILE, dim)
    shape = (rows, blocks, kv_heads, per_head, splits, TILE)
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((*shape, dim), out_dtype), jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types=[
            plgpu.SMEM((warpgroups, TILE, dim), dtype, transforms=tiled),
            plgpu.SMEM(ring, dtype, transforms=tiled),
            plgpu.SMEM(ring, dtype, transforms=tiled),
            plgpu.SMEM((warpgroups, TILE, dim), out_dtype, transforms=_swizzled(out_dtype, dim)),
            plgpu.SMEM((warpgroups, TILE), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=PAIR, num_barriers=stages),
            plgpu.Barrier(num_arrivals=PAIR, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ],
        grid=(splits, pl.cdiv(per_head, warpgroups), kv_heads, blocks, rows),
        grid_names=("split", "tile", "head", "block", "b"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(tiles, k_pages, v_pages, *meta, seen)


def _swizzled(dtype, columns: int) -> tuple:
    """The layout in shared memory that TMA writes and wgmma reads without bank conflicts."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)
