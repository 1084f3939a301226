"""Shared parts of the Pallas Mosaic GPU kernels for Hopper: page lists, the ring of buffers, tile operations, launch.

Pallas' interpreter has no register layouts, no transposed references, and no product with an operand in registers.
`Warpgroup` hides that: kernels call it, and it does the same on a GPU and in the interpreter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # query rows of a tile, and tokens of a page
LOWEST = -1e30  # score of a masked key; finite, so that exp2 of a difference of two is 1 and not NaN
ROWS = plgpu.Layout.WGMMA
COLUMNS = plgpu.Layout.WGMMA_TRANSPOSED


def swizzled(dtype, columns: int) -> tuple:
    """Return tiling and swizzle of a shared-memory buffer that TMA writes and wgmma reads without bank conflicts."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def listed_pages(at, places_ref, count_ref, dense_ref):
    """Return the number of pages that a block of queries attends to, and a function from list index to page place.

    at: index ``(row, block, KV head)`` of the queries in the references of a `Selection`. place: a page's index in its
    row of the page table.
    """
    dense = dense_ref[at]

    def place(index):
        return jnp.where(dense > 0, index, places_ref[(*at, jnp.minimum(index, places_ref.shape[3] - 1))])

    return count_ref[at], place


def fill_ring(steps, stages: int, *free):
    """Return a decorator that calls ``fill(step, slot)`` to load step after step into a ring of ``stages`` buffers.

    A buffer ``slot`` is filled again only when its ``free`` barriers say that it has been read.

    At the end the loop waits for all buffers, so that nothing is under way when the grid block ends.
    """
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
        def _(step):
            wait(lax.rem(step, jnp.int32(stages)))

    return run


def launch(kernel, interpret, *, warpgroups: int, names: tuple[str, ...], **shapes):
    """Return a function that runs the Pallas ``kernel`` on its operands, over a grid with axes called ``names``.

    interpret: parameters of Pallas' interpreter; None for a GPU. shapes: ``grid``, ``out_type`` and ``scratch_types``
    of ``plgpu.kernel``.
    """
    return plgpu.kernel(
        kernel, grid_names=names, num_threads=warpgroups, thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        **shapes, **({} if interpret is None else {"interpret": interpret}))


class Warpgroup:
    """Operations of a warpgroup on tiles (load, store, multiply), the same on a GPU and in Pallas' interpreter."""

    def __init__(self, interpret) -> None:
        self.interpreted = interpret is not None

    def load(self, ref, layout, optimized: bool = True) -> jax.Array:
        """Load the whole array behind a memory reference into registers, in the register layout ``layout``."""
        return ref[...] if self.interpreted else plgpu.load(ref, (), layout=layout, optimized=optimized)

    def load_transposed(self, ref) -> jax.Array:
        """Load a tile of 8-bit elements transposed and as float16, because Mosaic cannot transpose 8-bit elements."""
        if self.interpreted:
            return ref[...].T.astype(jnp.float16)
        columns = plgpu.load(ref.transpose((1, 0)), (), layout=COLUMNS)
        return plgpu.layout_cast(columns.astype(jnp.float16), ROWS)

    def store_transposed(self, ref, x: jax.Array) -> None:
        """Store the transpose of tile ``x``, as float16, in the memory reference ``ref``."""
        x = x.astype(jnp.float16)
        if self.interpreted:
            ref[...] = x.T
        else:
            ref.transpose((1, 0))[...] = plgpu.layout_cast(x, COLUMNS)

    def products(self, shape: tuple[int, int], *pairs) -> list[jax.Array]:
        """Return ``left @ right.T``, float32 of ``shape``, for every pair of tiles."""
        if self.interpreted:
            return [jnp.dot(left[...].astype(jnp.float32), right[...].astype(jnp.float32).T) for left, right in pairs]

        def multiply(*accumulators):
            for acc, (left, right) in zip(accumulators, pairs):
                plgpu.wgmma(acc, left, right.transpose((1, 0)))
            return [acc[...] for acc in accumulators]

        return pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * len(pairs))

    def add_product(self, acc: jax.Array, left: jax.Array, right) -> jax.Array:
        """Return ``acc + left @ right``: left, rounded to right's dtype, is in registers, right in shared memory."""
        if self.interpreted:
            return acc + jnp.dot(left.astype(right.dtype), right[...], preferred_element_type=jnp.float32)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, left.astype(right.dtype), right))(plgpu.ACC.init(acc))

    def along(self, vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        """Broadcast a vector to a tile of ``shape``, along whose axis ``axis`` it lies."""
        return lax.broadcast_in_dim(vector, shape, [axis])

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """Return an int32 tile of ``shape`` that holds every element's index along ``axis``."""
        if self.interpreted:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=ROWS)

    def full(self, shape: tuple[int, ...], value: float, layout) -> jax.Array:
        """Return a float32 tile or vector that holds ``value`` everywhere, in the register layout ``layout``."""
        array = jnp.full(shape, value, jnp.float32)
        return array if self.interpreted else plgpu.layout_cast(array, layout)
