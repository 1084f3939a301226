"""Numeric guard: finds the rows of a batch with unusable numbers, not finite or beyond what their 8 bits hold."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from qwen_kernels.attention import EightBitPages

from qwen_jax.model import Qwen2, params_of
from qwen_jax.quantization import INT4, QuantizedTensor, widened


class Guard:
    """Finder of rows whose numbers become unusable in a step; its checks are traced into the step's program.

    A row trips when its own queries, keys or values show unusable numbers; other rows do not.

    Attributes:
      trips: i32 ``[R]``, 0 or 1 + the first layer in which a row tripped; the number of layers stands for what comes
        after the last one.
    """

    def __init__(self, known: jax.Array) -> None:
        """Begin with no tripped row. known: bool ``[R, T]``, positions to be checked: those that are no padding."""
        self._known = known
        self.trips = jnp.zeros(len(known), jnp.int32)

    def check_storable(self, layer: int, written: Iterable[tuple[EightBitPages, jax.Array]], offset: int = 0) -> None:
        """Mark as tripped the rows with keys or values ``[R, T, K, H]`` that their 8-bit pages cannot hold.

        offset: place of the first of these tokens in the row.
        """
        for pages, values in written:
            self._trip(layer, jnp.any(pages.out_of_range(values), axis=(2, 3)), offset)

    def check_finite(self, layer: int, x: jax.Array, offset: int = 0) -> None:
        """Mark as tripped the rows with NaN or Inf in ``x[R, T, ...]``, which a layer computed."""
        self._trip(layer, ~jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim))), offset)

    def _trip(self, layer: int, wrong: jax.Array, offset: int) -> None:
        """Mark rows with an unusable number at any known position as tripped in a layer. wrong: bool ``[R, T]``."""
        rows = jnp.any(wrong & self._known[:, offset:offset + wrong.shape[1]], axis=1)
        self.trips = jnp.where((self.trips == 0) & rows, layer + 1, self.trips)


def damaged_weights(model: Qwen2) -> jax.Array:
    """Return 1 + the first layer whose 8-bit weights have a scale that is not a positive number; 0 without one.

    Damaged weights trip all rows. They are checked once for all the tokens of a step. int4 has too many scales for
    that, a tenth of what a step reads; what is not finite shows in what a layer computes.
    """
    num_layers = model.config.num_layers
    layers = [jnp.int32(num_layers + 2)]
    for path, value in params_of(model).items():
        if isinstance(value, QuantizedTensor) and value.dtype != INT4:
            layer = int(path.split(".")[1]) if path.startswith("layers.") else num_layers
            fine = jnp.all((value.scale > 0) & jnp.isfinite(value.scale))
            layers.append(jnp.where(fine, layers[0], layer + 1))
    first = jnp.min(jnp.stack(layers))
    return jnp.where(first == layers[0], 0, first)


def in_16_bits(model: Qwen2) -> Qwen2:
    """Return the network with its 8-bit weights widened, so that products do not round their inputs to 8 bits."""
    graph, params = nnx.split(model)
    return nnx.merge(graph, widened(params))


def earlier_trip(trips: jax.Array, others: jax.Array) -> jax.Array:
    """Return for each row the earlier of two trips: i32[R], 1 + the layer in which it tripped, 0 for none."""
    return jnp.where((trips > 0) & ((others == 0) | (trips < others)), trips, others)
