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

    A row trips where its queries, keys and values show it; other rows do not.

    Attributes:
      trips: i32 ``[R]``, 0 or 1 + the first layer in which it showed; the number of layers stands for what comes after
        the last one.
    """

    def __init__(self, known: jax.Array) -> None:
        """known: bool ``[R, T]``, positions that are no padding."""
        self._known = known
        self.trips = jnp.zeros(len(known), jnp.int32)

    def storable(self, layer: int, written: Iterable[tuple[EightBitPages, jax.Array]], offset: int = 0) -> None:
        """Keys and values ``[R, T, K, H]`` on their way into 8-bit pages; offset: of their first position."""
        for pages, values in written:
            self._trip(layer, jnp.any(pages.beyond(values), axis=(2, 3)), offset)

    def finite(self, layer: int, x: jax.Array, offset: int = 0) -> None:
        """``x[R, T, ...]`` that a layer computed; offset: of its first position."""
        self._trip(layer, ~jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim))), offset)

    def _trip(self, layer: int, wrong: jax.Array, offset: int) -> None:
        """wrong: bool ``[R, T]``."""
        rows = jnp.any(wrong & self._known[:, offset:offset + wrong.shape[1]], axis=1)
        self.trips = jnp.where((self.trips == 0) & rows, layer + 1, self.trips)


def damaged_weights(model: Qwen2) -> jax.Array:
    """0, or 1 + the first layer with a scale of weights that is not a positive number, i32. That trips all rows, and is
    asked once for all the tokens of a step."""
    num_layers = model.config.num_layers
    found = [jnp.int32(num_layers + 2)]
    for path, value in params_of(model).items():
        if isinstance(value, FP8Tensor):
            layer = int(path.split(".")[1]) if path.startswith("layers.") else num_layers
            fine = jnp.all((value.scale > 0) & jnp.isfinite(value.scale))
            found.append(jnp.where(fine, found[0], layer + 1))
    first = jnp.min(jnp.stack(found))
    return jnp.where(first == found[0], 0, first)


def first_trip(one: jax.Array, other: jax.Array) -> jax.Array:
    """Of two i32 arrays of trips, the earlier layer."""
    return jnp.where((one > 0) & ((other == 0) | (one < other)), one, other)
