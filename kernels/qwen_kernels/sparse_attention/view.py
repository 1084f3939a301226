"""Data that a selector gets to rank pages for one block of queries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_kernels.attention.eight_bit import EightBitPages
from qwen_kernels.attention.storage import from_storage, read_pages
from qwen_kernels.sparse_attention.summaries import LEAVES, RADIX


class View(NamedTuple):
    """Keys, summaries and positions from which a selector ranks pages for one block of queries of every row.

    Attributes:
      k_pages: ``[P, K, PAGE, H]`` as stored.
      summaries: ``[P, K, nodes, 2, H]`` as stored.
      page_table: i32 ``[B, N]``.
      heads: i32 ``[K]``, the pages' KV heads that the queries belong to.
      own: i32 ``[B]``, place of the page that the queries stand in; later pages do not exist for them.
      positions: i32 ``[B, R]`` of the queries.
      real: bool ``[B, 1, R]``, queries that are not padding.
      local: number of pages up to and with ``own`` that are taken without a rank.
      furthest: i32 scalar, the largest ``own`` of all blocks of the chunk that this block belongs to.
    """

    k_pages: jax.Array | EightBitPages
    summaries: jax.Array
    page_table: jax.Array
    heads: np.ndarray
    own: jax.Array
    positions: jax.Array
    real: jax.Array
    local: int
    furthest: jax.Array

    def keys(self) -> jax.Array:
        """Return all keys of the rows, f32 ``[B, K, N, PAGE, H]``, at a cost that is linear in the context."""
        places = jnp.arange(self.page_table.shape[1])
        return read_pages(self.k_pages, self.page_table[:, None], self.heads[:, None], places).astype(jnp.float32)

    def keys_of(self, places: jax.Array) -> jax.Array:
        """Return the keys of pages ``places`` i32 ``[B, K, C]``, f32 ``[B, K, C, PAGE, H]``."""
        return read_pages(self.k_pages, self._ids(places), self.heads[:, None], places).astype(jnp.float32)

    def nodes(self, level: int, index: jax.Array) -> jax.Array:
        """Return mean and deviation of the keys of a level's nodes ``index`` i32 ``[B, K, C]``: ``[B, K, C, 2, H]``.

        Level 0 are pages. Nodes that are not whole hold arbitrary values.
        """
        return self._stored(index, RADIX**level, LEAVES + level)

    def leaves(self, places: jax.Array) -> jax.Array:
        """Return mean and deviation of the keys of pages' leaves of 16 tokens, f32 ``[B, K, C, LEAVES, 2, H]``."""
        return self._stored(places, 1, slice(0, LEAVES))

    def _stored(self, index: jax.Array, span: int, slot: int | slice) -> jax.Array:
        """Return entry ``slot`` of the summaries of nodes, each of which spans ``span`` pages."""
        ids = self._ids((index + 1) * span - 1)
        return from_storage(self.summaries[ids, self.heads[:, None], slot]).astype(jnp.float32)

    def _ids(self, places: jax.Array) -> jax.Array:
        """Return the pages at ``places`` i32 ``[B, K, C]`` of the rows; those beyond a row are its first or last."""
        within = jnp.clip(places, 0, self.page_table.shape[1] - 1)
        return jnp.take_along_axis(self.page_table, within.reshape(len(places), -1), axis=1).reshape(places.shape)

    def for_each_head(self, places: jax.Array) -> jax.Array:
        """Broadcast page places i32 ``[B, C]`` or ``[C]`` to all rows and heads, i32 ``[B, K, C]``."""
        if places.ndim == 2:
            places = places[:, None]
        return jnp.broadcast_to(places, (len(self.page_table), len(self.heads), places.shape[-1]))

    def pages(self) -> jax.Array:
        """Return the places of all pages of the rows (their indices in the page table), i32 ``[B, K, N]``."""
        return self.for_each_head(jnp.arange(self.page_table.shape[1]))
