"""Finds, row by row, numbers that are of no use: not finite, or beyond what 8 bits hold."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from qwen_kernels.attention import EightBitPages

from qwen_jax.model import Qwen2, params_of
from qwen_jax.quantization import FP8Tensor


class Guard:
    """Looks at what a step computes while it is traced.

    A row trips where its queries, keys and values show it; other rows do not. Scales of weights are everybody's: where
    one is damaged, all rows trip.

    Attributes:
      trips: i32 ``[R]``, 0 or 1 + the first layer in which it showed; the number of layers stands for what comes after
        the last one.
    """

    def __init__(self, model: Qwen2, known: jax.Array) -> None:
        """known: bool ``[R, T]``, positions that are no padding."""
        self._known = known
        self.trips = jnp.zeros(len(known), jnp.int32)
        for path, value in params_of(model).items():
            if isinstance(value, FP8Tensor):
                layer = int(path.split(".")[1]) if path.startswith("layers.") else model.config.num_layers
                fine = jnp.all((value.scale > 0) & jnp.isfinite(value.scale))
                self._trip(layer, ~fine & jnp.any(known, axis=1))

    def storable(self, layer: int, written: Iterable[tuple[EightBitPages, jax.Array]]) -> None:
        """Keys and values ``[R, T, K, H]`` on their way into 8-bit pages."""
        for pages, values in written:
            self._trip(layer, jnp.any(jnp.any(pages.beyond(values), axis=(2, 3)) & self._known, axis=1))

    def finite(self, layer: int, x: jax.Array) -> None:
        """``x[R, T, ...]`` that a layer computed."""
        fine = jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim)))
        self._trip(layer, jnp.any(~fine & self._known, axis=1))

    def _trip(self, layer: int, rows: jax.Array) -> None:
        self.trips = jnp.where((self.trips == 0) & rows, layer + 1, self.trips)
