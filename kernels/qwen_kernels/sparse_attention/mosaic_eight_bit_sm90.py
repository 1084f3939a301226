"""Pallas Mosaic GPU form for Hopper that reads 8-bit pages: decode of int8 and e4m3, and prefill in FP8.

A score is (query times the keys' scales) . (stored key) plus the bias term, query . (bias rotated to the key's
position). Per RoPE plane the latter is ``a cos t + b sin t``, with t the plane's angle at the key and a, b made of
query and bias (``bias_term``): a second small product with cosines and sines, exact but for their rounding to float16.
Softmax weights sum to 1, so the scale and bias of values are applied to the result, outside of the kernels.

Decode reads a page once for all query heads of its KV head. Keys and values go from shared memory through registers,
where they become float16 (Mosaic converts e4m3 to nothing else, and it holds e4m3 and int8 exactly), into the tensor
core as the operand that may come from registers. That makes the 64 keys, and then the head's channels, the rows of the
product, and the query heads its columns: 8 of them, where as rows they would be padded to 64. Values are loaded by
columns: a page holds them ``[64, H]``, and the product wants ``[H, 64]``.

Prefill multiplies e4m3 with e4m3, twice as fast as 16 bits. The tensor core takes 8-bit operands only with the
contracted axis contiguous, so a warpgroup of its own transposes pages of values, through float16 registers: Mosaic has
no transposition of 8 bits. Sums of FP8 products keep about 14 bits in the tensor core; each page therefore has fresh
accumulators, which are added in float32.

Not yet run on a GPU: lowered for CUDA, and right in the interpreter (``tests/kernels/test_mosaic_eight_bit.py``).

Limits: bfloat16 queries, head dims 64 and 128, pages of keys and values of one type, prefill only of e4m3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_kernels.attention.eight_bit import E4M3, EightBit, EightBitPages
from qwen_kernels.sparse_attention.fp8_operands import WEIGHT_BITS, log2_queries, round_rows
from qwen_kernels.sparse_attention.mosaic_sm90 import _LOWEST, TILE, _swizzled
from qwen_kernels.sparse_attention.selection import Selection

HEADS = 8  # the tensor core's columns come in eights, and so do the query heads of a decode block
_ROWS = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout.WGMMA_TRANSPOSED


@dataclass(frozen=True)
class Tuning:
    """What may differ between devices and shapes."""

    warpgroups: int = 2  # compute warpgroups of a prefill block, each with the queries of a head of its own
    stages: int = 3      # pages under way
    splits: int = 4      # grid blocks that share the pages of a decode row


def supported(q: jax.Array, k_pages: EightBitPages, v_pages: EightBitPages) -> str | None:
    """Why the kernels cannot run for queries ``[B, T, K, G, H]`` and these pages; None if they can."""
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
    """See ``api.attend``. Slots of a row's last page beyond its length must hold finite values."""
    if (reason := supported(q, k_pages, v_pages)) is not None:
        raise ValueError(reason)
    meta = (selection.places, selection.count, selection.dense.astype(jnp.int32), page_table)
    run = _prefill if q.shape[1] > selection.count.shape[1] else _decode
    out = run(q, k_pages, v_pages, meta, start, tuning, interpret)
    form = v_pages.form
    out = out.astype(jnp.float32) * form.scale[:, None] + form.bias[:, None]
    return jnp.where(length[:, None, None, None, None] > 0, out, 0).astype(q.dtype)


def bias_term(q: jax.Array, form: EightBit) -> tuple[jax.Array, jax.Array]:
    """Coefficients f32 ``[..., K, G, H / 2]`` of the cosines and sines of a key's angles in its bias's product with q.

    With the bias's channels u, w of a plane, and the query's x, y: the bias at angle t is (u cos t - w sin t,
    w cos t + u sin t), and its product with the query is (x u + y w) cos t + (y u - x w) sin t.
    """
    x, y = jnp.split(q, 2, axis=-1)
    u, w = jnp.split(form.bias[:, None] * form.magnitude, 2, axis=-1)
    return x * u + y * w, y * u - x * w


def _angles(form: EightBit, pages: int) -> tuple[jax.Array, jax.Array]:
    """Angles f32 by which RoPE rotates to the beginning of page n, ``[pages, H / 2]``, and from there to each key."""
    begin = jnp.arange(pages, dtype=jnp.float32)[:, None] * TILE * form.frequencies
    return begin, jnp.arange(TILE, dtype=jnp.float32)[:, None] * form.frequencies


def _relative(x: jax.Array, axis) -> tuple[jax.Array, jax.Array]:
    """``x`` divided by its largest along ``axis``, and that. Float16 then holds it, whatever its size."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1.0)
    return x / largest, jnp.squeeze(largest, axis)


def _decode(q, k_pages, v_pages, meta, start, tuning: Tuning, interpret):
    """Normalised sums of stored values for one query per block, f32 ``[B, T, K, G, H]``."""
    rows, tokens, kv_heads, group, dim = q.shape
    form, stages, splits = k_pages.form, tuning.stages, tuning.splits
    heads = pl.cdiv(group, HEADS) * HEADS
    scaled = jnp.pad(log2_queries(q), ((0, 0),) * 3 + ((0, heads - group), (0, 0)))
    content, content_factor = _relative(scaled * form.scale[:, None], -1)
    cos, sin = bias_term(scaled, form)
    # Rotated to a page's beginning the coefficients are (cos c + sin s, sin c - cos s): two products with c and s.
    terms = jnp.stack([jnp.concatenate([cos, sin], -1), jnp.concatenate([sin, -cos], -1)], -3).swapaxes(-1, -2)
    terms, bias_factor = _relative(terms, (-3, -2))  # [B, T, K, 2, H, heads], [B, T, K, heads]
    begin, within = _angles(form, meta[3].shape[1])
    turns = jnp.stack([jnp.tile(jnp.cos(begin), 2), jnp.tile(jnp.sin(begin), 2)], axis=1)  # [N, 2, H]
    table = jnp.concatenate([jnp.cos(within), jnp.sin(within)], axis=-1).astype(jnp.float16)
    seen = (start[:, None] + jnp.arange(tokens)) % TILE + 1  # keys of the own page
    on = _Warpgroup(interpret)

    def kernel(q_ref, terms_ref, factor_ref, turns_ref, table_ref, k_ref, v_ref, places_ref, count_ref, dense_ref,
               ids_ref, seen_ref, out_ref, lse_ref, q_smem, table_smem, turn_smem, k_smem, v_smem,
               turned_smem, weight_smem, q_bar, k_bar, v_bar, k_free, v_free):
        wg, split = lax.axis_index("wg"), lax.axis_index("split")
        at = b, block, head = lax.axis_index("b"), lax.axis_index("block"), lax.axis_index("head")
        count, place = _listed(at, places_ref, count_ref, dense_ref)
        share = lax.div(count + (splits - 1), jnp.int32(splits))
        first = jnp.minimum(split * share, count)
        steps = jnp.minimum(share, count - first)

        @pl.when(wg == 1)
        def _memory():
            plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem, q_bar)
            plgpu.copy_gmem_to_smem(table_ref, table_smem, q_bar)

            @_ring(steps, stages, k_free, v_free)
            def _(step, slot):
                n = place(first + step)
                page = ids_ref[b, n]
                plgpu.copy_gmem_to_smem(k_ref.at[page, head], k_smem.at[slot], k_bar.at[slot])
                plgpu.copy_gmem_to_smem(turns_ref.at[n], turn_smem.at[slot], k_bar.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[page, head], v_smem.at[slot], v_bar.at[slot])

        @pl.when(wg == 0)
        def _compute():
            plgpu.barrier_wait(q_bar)
            with_cos, with_sin = (on.load(terms_ref.at[(*at, i)], _ROWS, optimized=False) for i in range(2))
            factors = [on.along(on.load(factor_ref.at[(*at, i)], _ROWS.reduce(0), optimized=False), (TILE, heads), 1)
                       for i in range(2)]

            def step(index, carry, masked: bool):
                acc, top, mass = carry
                slot = lax.rem(index, jnp.int32(stages))
                plgpu.barrier_wait(k_bar.at[slot])
                cos, sin = (on.along(on.load(turn_smem.at[slot, i], _ROWS.reduce(1)), (dim, heads), 0)
                            for i in range(2))
                on.store_transposed(turned_smem, with_cos * cos + with_sin * sin)
                keys = on.load(k_smem.at[slot], _ROWS).astype(jnp.float16)
                plgpu.commit_smem()
                content, bias = on.products((TILE, heads), (keys, q_smem), (table_smem, turned_smem))
                plgpu.barrier_arrive(k_free.at[slot])
                scores = content * factors[0] + bias * factors[1]
                if masked:
                    scores = jnp.where(on.iota(scores.shape, 0) < seen_ref[b, block], scores, _LOWEST)
                higher = jnp.maximum(top, scores.max(axis=0))
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - on.along(higher, scores.shape, 1))
                mass = mass * on.along(decay, mass.shape, 1) + weights
                acc = acc * on.along(decay, acc.shape, 1)
                on.store_transposed(weight_smem, weights)
                plgpu.barrier_wait(v_bar.at[slot])
                values = on.load_transposed(v_smem.at[slot])
                plgpu.commit_smem()  # the weights are there; the page's buffer may be filled again
                plgpu.barrier_arrive(v_free.at[slot])
                return acc + on.products((dim, heads), (values, weight_smem))[0], higher, mass

            carry = (on.full((dim, heads), 0, _ROWS), on.full((heads,), _LOWEST, _ROWS.reduce(0)),
                     on.full((TILE, heads), 0, _ROWS))
            own = (steps > 0) & (first + steps == count)  # the list ends with the query's own page
            plain = steps - own.astype(jnp.int32)
            carry = lax.fori_loop(0, plain, lambda i, c: step(i, c, False), carry)
            acc, top, mass = lax.fori_loop(plain, steps, lambda i, c: step(i, c, True), carry)
            total = mass.sum(axis=0)
            total = jnp.where(total > 0, total, 1.0)
            out_ref[(*at, split)] = acc / on.along(total, acc.shape, 1)
            lse_ref[(*at, split)] = (top + jnp.log2(total)) * math.log(2)

    half, f32, stored = jnp.float16, jnp.float32, k_pages.dtype
    shape = (rows, tokens, kv_heads, splits)
    pages = plgpu.SMEM((stages, TILE, dim), stored, transforms=_swizzled(stored, dim))
    out, lse = _launch(
        kernel, interpret, warpgroups=2, grid=(splits, kv_heads, tokens, rows),
        names=("split", "head", "block", "b"),
        out_type=(jax.ShapeDtypeStruct((*shape, dim, heads), f32), jax.ShapeDtypeStruct((*shape, heads), f32)),
        scratch_types=[
            plgpu.SMEM((heads, dim), half, transforms=_swizzled(half, dim)),
            plgpu.SMEM((TILE, dim), half, transforms=_swizzled(half, dim)),
            plgpu.SMEM((stages, 2, dim), f32), pages, pages,
            plgpu.SMEM((heads, dim), half, transforms=_swizzled(half, dim)),
            plgpu.SMEM((heads, TILE), half, transforms=_swizzled(half, TILE)),
            plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            *[plgpu.Barrier(num_barriers=stages)] * 3],
    )(content.astype(half), terms, jnp.stack([content_factor, bias_factor], axis=-2), turns, table, k_pages.stored,
      v_pages.stored, *meta, seen)
    joined = jnp.sum(out * jax.nn.softmax(lse, axis=3)[..., None, :], axis=3)  # [B, T, K, H, heads]
    return joined.swapaxes(-1, -2)[:, :, :, :group]


def _prefill(q, k_pages, v_pages, meta, start, tuning: Tuning, interpret):
    """Normalised sums of stored values for the 64 queries of each block, f16 ``[B, T, K, G, H]``."""
    del start  # the own page's keys are as many as a query's row says
    rows, tokens, kv_heads, group, dim = q.shape
    blocks, form, stages = tokens // TILE, k_pages.form, tuning.stages
    computing = min(tuning.warpgroups, group)
    tiles = q.reshape(rows, blocks, TILE, kv_heads, group, dim)
    scaled = log2_queries(tiles)
    content, content_factor = round_rows(scaled * form.scale[:, None])
    terms, bias_factor = _relative(jnp.concatenate(bias_term(scaled, form), -1), -1)
    factors = jnp.stack([content_factor, bias_factor], axis=-2)  # [B, Q, TILE, K, 2, G]
    content, terms = (x.transpose(0, 1, 3, 4, 2, 5) for x in (content, terms.astype(jnp.float16)))
    factors = factors.transpose(0, 1, 3, 5, 4, 2)  # [B, Q, K, G, 2, TILE]
    begin, within = _angles(form, meta[3].shape[1])
    (c, s), (cos, sin) = ((jnp.cos(x), jnp.sin(x)) for x in (begin[:, None], within))
    # Of every position: as many bytes as a row of keys and values, but the same for all rows, heads and layers.
    table = jnp.concatenate([c * cos - s * sin, c * sin + s * cos], axis=-1).astype(jnp.float16)  # [N, TILE, H]
    on = _Warpgroup(interpret)

    def kernel(q_ref, terms_ref, factor_ref, table_ref, k_ref, v_ref, places_ref, count_ref, dense_ref, ids_ref,
               out_ref, q_smem, terms_smem, k_smem, table_smem, v_smem, turned_smem, weight_smem, out_smem, q_bar,
               k_bar, v_bar, turned_bar, k_free, v_free, turned_free):
        wg, group_tile = lax.axis_index("wg"), lax.axis_index("tile")
        at = b, block, head = lax.axis_index("b"), lax.axis_index("block"), lax.axis_index("head")
        steps, place = _listed(at, places_ref, count_ref, dense_ref)

        @pl.when(wg == computing)
        def _memory():
            plgpu.set_max_registers(40, action="decrease")

            @_ring(steps, stages, k_free, v_free)
            def _(step, slot):
                n = place(step)
                page = ids_ref[b, n]
                plgpu.copy_gmem_to_smem(k_ref.at[page, head], k_smem.at[slot], k_bar.at[slot])
                plgpu.copy_gmem_to_smem(table_ref.at[n], table_smem.at[slot], k_bar.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[page, head], v_smem.at[slot], v_bar.at[slot])

        @pl.when(wg == computing + 1)
        def _transpose():
            plgpu.set_max_registers(64, action="decrease")

            @_ring(steps, stages, turned_free)
            def _(step, slot):
                plgpu.barrier_wait(v_bar.at[slot])
                for half in range(dim // TILE):
                    channels = pl.ds(half * TILE, TILE)
                    turned_smem[slot, channels] = on.load_transposed(v_smem.at[slot, :, channels]).astype(E4M3)
                plgpu.commit_smem()
                plgpu.barrier_arrive(v_free.at[slot])
                plgpu.barrier_arrive(turned_bar.at[slot])

        @pl.when(wg < computing)
        def _compute():
            plgpu.set_max_registers(min(232, (512 - 40 - 64) // computing // 8 * 8), action="increase")
            tile = jnp.minimum(group_tile * computing + wg, group - 1)  # one too many repeats the last
            plgpu.copy_gmem_to_smem(q_ref.at[(*at, tile)], q_smem.at[wg], q_bar.at[wg])
            plgpu.copy_gmem_to_smem(terms_ref.at[(*at, tile)], terms_smem.at[wg], q_bar.at[wg])
            plgpu.barrier_wait(q_bar.at[wg])
            factors = [on.load(factor_ref.at[(*at, tile, i)], _ROWS.reduce(1), optimized=False) for i in range(2)]

            def step(index, carry, masked: bool):
                acc, top, total = carry
                slot = lax.rem(index, jnp.int32(stages))
                plgpu.barrier_wait(k_bar.at[slot])
                content, bias = on.products((TILE, TILE), (q_smem.at[wg], k_smem.at[slot]),
                                            (terms_smem.at[wg], table_smem.at[slot]))
                plgpu.barrier_arrive(k_free.at[slot])
                scores = content * on.along(factors[0], content.shape, 0) + bias * on.along(factors[1], bias.shape, 0)
                if masked:
                    scores = jnp.where(on.iota(scores.shape, 1) <= on.iota(scores.shape, 0), scores, _LOWEST)
                higher = jnp.maximum(top, scores.max(axis=1))
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - on.along(higher, scores.shape, 0))
                total = total * decay + weights.sum(axis=1)
                # Two buffers: a warp may be here before another's product with the last weights is done.
                mine = weight_smem.at[wg, lax.rem(index, jnp.int32(2))]
                mine[...] = (weights * 2.0**WEIGHT_BITS).astype(E4M3)
                plgpu.commit_smem()
                plgpu.barrier_wait(turned_bar.at[slot])
                part, = on.products((TILE, dim), (mine, turned_smem.at[slot]))
                plgpu.barrier_arrive(turned_free.at[slot])
                return acc * on.along(decay, acc.shape, 0) + part, higher, total

            carry = (on.full((TILE, dim), 0, _ROWS), on.full((TILE,), _LOWEST, _ROWS.reduce(1)),
                     on.full((TILE,), 0, _ROWS.reduce(1)))
            plain = jnp.maximum(steps - 1, 0)
            carry = lax.fori_loop(0, plain, lambda i, c: step(i, c, False), carry)
            acc, _, total = lax.fori_loop(plain, steps, lambda i, c: step(i, c, True), carry)
            total = jnp.where(total > 0, total, 1.0) * 2.0**WEIGHT_BITS
            out_smem.at[wg][...] = (acc / on.along(total, acc.shape, 0)).astype(jnp.float16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[(*at, tile)])
            plgpu.wait_smem_to_gmem(0)

    def buffers(count: tuple[int, ...], shape: tuple[int, int], dtype, columns: int | None = None):
        return plgpu.SMEM((*count, *shape), dtype, transforms=_swizzled(dtype, columns or shape[1]))

    half, page, ring = jnp.float16, (TILE, dim), (stages,)
    out = _launch(
        kernel, interpret, warpgroups=computing + 2, names=("tile", "head", "block", "b"),
        grid=(pl.cdiv(group, computing), kv_heads, blocks, rows),
        out_type=jax.ShapeDtypeStruct(content.shape, half),
        scratch_types=[
            buffers((computing,), page, E4M3), buffers((computing,), page, half), buffers(ring, page, E4M3),
            buffers(ring, page, half), buffers(ring, page, E4M3, TILE), buffers(ring, (dim, TILE), E4M3),
            buffers((computing, 2), (TILE, TILE), E4M3), buffers((computing,), page, half),
            plgpu.Barrier(num_arrivals=2, num_barriers=computing), plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=computing, num_barriers=stages), plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=computing, num_barriers=stages)],
    )(content, terms, factors, table, k_pages.stored, v_pages.stored, *meta)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(q.shape)


def _listed(at, places_ref, count_ref, dense_ref):
    """How many pages a block attends to, and a function from a page's index among them to its place in the row."""
    dense = dense_ref[at]

    def place(index):
        return jnp.where(dense > 0, index, places_ref[(*at, jnp.minimum(index, places_ref.shape[3] - 1))])

    return count_ref[at], place


def _ring(steps, stages: int, *free):
    """Runs ``fill(step, slot)`` for all steps, each when the barriers ``free`` of its slot allow it."""
    def run(fill):
        def wait(slot):
            for barrier in free:
                plgpu.barrier_wait(barrier.at[slot])

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(stages))
            pl.when(step >= stages)(lambda: wait(slot))
            fill(step, slot)

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):  # nothing is left in the ring when the block ends
            wait(lax.rem(step, jnp.int32(stages)))

    return run


def _launch(kernel, interpret, *, warpgroups: int, names, **shapes):
    return plgpu.kernel(
        kernel, grid_names=names, num_threads=warpgroups, thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        **shapes, **({} if interpret is None else {"interpret": interpret}))


class _Warpgroup:
    """A warpgroup's operations on tiles, and what the interpreter does instead.

    It has no layouts, no transposed references, and no product with an operand in registers.
    """

    def __init__(self, interpret):
        self.interpreted = interpret is not None

    def load(self, ref, layout, optimized: bool = True):
        return ref[...] if self.interpreted else plgpu.load(ref, (), layout=layout, optimized=optimized)

    def load_transposed(self, ref):
        """A tile of 8 bits as float16, transposed. Mosaic exchanges pairs of 16 bits between lanes, not of 8."""
        if self.interpreted:
            return ref[...].T.astype(jnp.float16)
        columns = plgpu.load(ref.transpose((1, 0)), (), layout=_COLUMNS)
        return plgpu.layout_cast(columns.astype(jnp.float16), _ROWS)

    def store_transposed(self, ref, x):
        """Stores ``x``, transposed and in float16."""
        x = x.astype(jnp.float16)
        if self.interpreted:
            ref[...] = x.T
        else:
            ref.transpose((1, 0))[...] = plgpu.layout_cast(x, _COLUMNS)

    def products(self, shape, *pairs):
        """``left @ right.T`` for every pair, in float32 of the ``shape``."""
        if self.interpreted:
            return [jnp.dot(left[...].astype(jnp.float32), right[...].astype(jnp.float32).T) for left, right in pairs]

        def multiply(*accumulators):
            for acc, (left, right) in zip(accumulators, pairs):
                plgpu.wgmma(acc, left, right.transpose((1, 0)))
            return [acc[...] for acc in accumulators]

        return pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * len(pairs))

    def along(self, x, shape, axis: int):
        """A vector that lies along ``axis``, for every index of the other."""
        return lax.broadcast_in_dim(x, shape, [axis])

    def iota(self, shape, axis: int):
        if self.interpreted:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_ROWS)

    def full(self, shape, value, layout):
        array = jnp.full(shape, value, jnp.float32)
        return array if self.interpreted else plgpu.layout_cast(array, layout)
