"""What a selector sees of one block of queries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_kernels.attention.eight_bit import EightBitPages
from qwen_kernels.attention.storage import from_storage, read_pages
from qwen_kernels.sparse_attention.summaries import LEAVES, RADIX


class View(NamedTuple):
    """What a selector may look at, for one block of queries of every row."""

    k_pages: jax.Array | EightBitPages  # [P, K, PAGE, H] as stored
    summaries: jax.Array   # [P, K, nodes, 2, H] as stored
    page_table: jax.Array  # i32[B, N]
    heads: np.ndarray      # i32[K]: which of the pages' heads the queries' are
    own: jax.Array         # i32[B]: the page that the queries stand in; later ones do not exist for them
    positions: jax.Array   # i32[B, R] of the queries
    known: jax.Array       # bool[B, 1, R]: queries that are no padding
    local: int             # pages up to and with `own` that are taken anyway

    def keys(self) -> jax.Array:
        """Every key of the rows, ``[B, K, N, PAGE, H]``: linear in the context, which a fast selector avoids."""
        places = jnp.arange(self.page_table.shape[1])
        return read_pages(self.k_pages, self.page_table[:, None], self.heads[:, None], places).astype(jnp.float32)

    def nodes(self, level: int, index: jax.Array) -> jax.Array:
        """Nodes ``index`` i32[B, K, C] of a level (0: pages), ``[B, K, C, 2, H]``; those of no whole node: anything."""
        return self._stored(index, RADIX**level, LEAVES + level)

    def leaves(self, places: jax.Array) -> jax.Array:
        """The leaves of pages i32[B, K, C], ``[B, K, C, LEAVES, 2, H]``."""
        return self._stored(places, 1, slice(0, LEAVES))

    def _stored(self, index, span: int, slot) -> jax.Array:
        rows = index.shape[0]
        last = jnp.clip((index + 1) * span - 1, 0, self.page_table.shape[1] - 1)
        ids = jnp.take_along_axis(self.page_table, last.reshape(rows, -1), axis=1).reshape(index.shape)
        return from_storage(self.summaries[ids, self.heads[:, None], slot]).astype(jnp.float32)

    def every(self, places: jax.Array) -> jax.Array:
        """Places i32[B, C] or [C] for every row and head, i32[B, K, C]."""
        if places.ndim == 2:
            places = places[:, None]
        return jnp.broadcast_to(places, (len(self.page_table), len(self.heads), places.shape[-1]))

    def pages(self) -> jax.Array:
        """All places of the rows, i32[B, K, N]."""
        return self.every(jnp.arange(self.page_table.shape[1]))
