"""Pages that hold keys and values in 8 bits: integers, or floating point of 4 exponent and 3 mantissa bits (e4m3).

Qwen2.5's key projections add biases that are up to tens of times larger than what the tokens say. Rounded together, the
rounding of the bias drowns the rest, whatever the scale. So pages hold a key without its bias, and the bias, rotated to
the key's position, is added when a page is read. A scale is shared by the two channels that RoPE rotates together: it
commutes with the rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
MOST = {"int8": 127.0, "e4m3": 448.0}  # the largest stored value


class EightBit(NamedTuple):
    """What 8-bit pages of one layer leave out: an element is ``stored * scale + bias``.

    Attributes:
      scale: f32 ``[K, H]``, positive.
      bias: f32 ``[K, H]``; of keys, at position 0.
      frequencies: f32 ``[H / 2]``, by which RoPE rotates a key's bias, channel i with channel ``i + H / 2``; None for
        values.
      magnitude: f32 scalar, the factor that the rotation applies (YaRN's).
    """

    scale: jax.Array
    bias: jax.Array
    frequencies: jax.Array | None = None
    magnitude: jax.Array | float = 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EightBitPages:
    """``stored[P, K, PAGE, H]``, int8 or e4m3 (on a CPU its bits, as uint8), and how to read it."""

    stored: jax.Array
    form: EightBit

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.stored.dtype

    def __len__(self) -> int:
        return len(self.stored)

    def read(self, ids: jax.Array, heads: jax.Array, places: jax.Array) -> jax.Array:
        """Pages ``ids``, which stand at ``places`` of their rows, as f32 ``[..., PAGE, H]``; all three broadcast."""
        form, page = self.form, self.stored.shape[2]
        values = _decode(self.stored[ids, heads]) * form.scale[heads][..., None, :]
        bias = form.bias[heads]
        if form.frequencies is None:
            return values + bias[..., None, :]
        # Rotated to the page's beginning, and from there to each of its positions: cosines of pages, not of keys.
        begin = places[..., None].astype(jnp.float32) * page * form.frequencies
        bias = _rotate(bias, jnp.cos(begin), jnp.sin(begin))
        within = jnp.arange(page, dtype=jnp.float32)[:, None] * form.frequencies
        return values + _rotate(bias[..., None, :], jnp.cos(within), jnp.sin(within)) * form.magnitude

    def encode(self, values: jax.Array) -> jax.Array:
        """``values[..., K, H]``, rotated and without bias, as elements of ``stored``. Out of range is clipped."""
        scaled = values.astype(jnp.float32) / self.form.scale
        if self.dtype == jnp.int8:
            return jnp.round(jnp.clip(scaled, -MOST["int8"], MOST["int8"])).astype(jnp.int8)
        floats = jnp.clip(scaled, -MOST["e4m3"], MOST["e4m3"]).astype(E4M3)  # a cast alone gives NaN beyond 464
        return floats if self.dtype == E4M3 else jax.lax.bitcast_convert_type(floats, jnp.uint8)

    def beyond(self, values: jax.Array) -> jax.Array:
        """Whether ``values[..., K, H]`` cannot be stored (not finite, or clipped), or the scales are damaged, bool
        ``[..., K, H]``."""
        most = MOST["int8" if self.dtype == jnp.int8 else "e4m3"]
        inside = jnp.abs(values.astype(jnp.float32)) <= most * self.form.scale
        return ~(inside & (self.form.scale > 0) & jnp.isfinite(self.form.scale))


def eight_bit_dtype(kind: str) -> jnp.dtype:
    """The dtype of the array that stores "int8" or "e4m3" elements on the default backend."""
    if kind == "int8":
        return jnp.dtype(jnp.int8)
    return jnp.dtype(jnp.uint8) if jax.default_backend() == "cpu" else E4M3


def _decode(stored: jax.Array) -> jax.Array:
    if stored.dtype != jnp.uint8:
        return stored.astype(jnp.float32)
    # e4m3 and float16 have the same layout but for the width of exponent and mantissa; half of XLA:CPU's own time.
    bits = stored.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return jnp.where(bits & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 2.0**8)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
