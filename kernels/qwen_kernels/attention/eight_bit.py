"""Pages that hold keys and values in 8 bits: integers, or floating point of 4 exponent and 3 mantissa bits (e4m3).

Qwen2.5's key projections add biases that are up to tens of times larger than what the tokens say. Rounded together, the
rounding of the bias drowns the rest, with any scale. So pages hold a key without its bias, and the bias, rotated to the
key's position, is added when a page is read. A scale is shared by the two channels that RoPE rotates together: it
commutes with the rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = {"int8": 127.0, "e4m3": 448.0}  # largest value that each element type stores
# Elements up to this multiple of the largest are clipped; larger ones cannot be stored. The range of int8 is measured:
# of other texts nearly a third of the tokens have a value outside, by half at most, and clipping it costs nothing.
CLIPPED = {"int8": 2.0, "e4m3": 1.0}


class PageFormat(NamedTuple):
    """Scale and bias of a layer's 8-bit pages: an element is ``stored * scale + bias``.

    Attributes:
      scale: f32 ``[K, H]``, positive.
      bias: f32 ``[K, H]``; for keys, the bias at position 0.
      frequencies: f32 ``[H / 2]``, RoPE's, which rotate a key's bias, channel i with channel ``i + H / 2``; None for
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
    """Pages of the key-value cache in 8 bits, and the scale and bias that turn them into keys or values.

    Attributes:
      stored: ``[P, K, PAGE, H]``, int8 or e4m3 (on a CPU its bits, as uint8).
      format: scale and bias of the elements.
    """

    stored: jax.Array
    format: PageFormat

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.stored.dtype

    def __len__(self) -> int:
        return len(self.stored)

    def read(self, ids: jax.Array, heads: jax.Array, places: jax.Array) -> jax.Array:
        """Return the keys or values that pages hold, with scale and bias, f32 ``[..., PAGE, H]``.

        The three arguments broadcast against each other.

        ids: i32, page ids. heads: i32, KV heads of the pages. places: i32, each page's index in its row.
        """
        page_format, page = self.format, self.stored.shape[2]
        values = _decode(self.stored[ids, heads]) * page_format.scale[heads][..., None, :]
        bias = page_format.bias[heads]
        if page_format.frequencies is None:
            return values + bias[..., None, :]
        # Rotated to the page's beginning, and from there to each of its positions: a cosine per page, not per key.
        begin = places[..., None].astype(jnp.float32) * page * page_format.frequencies
        bias = _rotate(bias, jnp.cos(begin), jnp.sin(begin))
        within = jnp.arange(page, dtype=jnp.float32)[:, None] * page_format.frequencies
        return values + _rotate(bias[..., None, :], jnp.cos(within), jnp.sin(within)) * page_format.magnitude

    def encode(self, values: jax.Array) -> jax.Array:
        """Convert keys (rotated) or values ``[..., K, H]``, without bias, to 8-bit elements, clipped to their range."""
        scaled = values.astype(jnp.float32) / self.format.scale
        if self.dtype == jnp.int8:
            return jnp.round(jnp.clip(scaled, -LARGEST["int8"], LARGEST["int8"])).astype(jnp.int8)
        floats = jnp.clip(scaled, -LARGEST["e4m3"], LARGEST["e4m3"]).astype(E4M3)  # a cast alone gives NaN beyond 464
        return floats if self.dtype == E4M3 else jax.lax.bitcast_convert_type(floats, jnp.uint8)

    def out_of_range(self, values: jax.Array) -> jax.Array:
        """Return which elements of ``values`` cannot be stored in 8 bits, bool ``[..., K, H]``.

        They are not finite, or too far out of range (`CLIPPED`), or their scale is damaged.
        """
        kind = "int8" if self.dtype == jnp.int8 else "e4m3"
        largest = LARGEST[kind] * CLIPPED[kind]
        inside = jnp.abs(values.astype(jnp.float32)) <= largest * self.format.scale
        return ~(inside & (self.format.scale > 0) & jnp.isfinite(self.format.scale))


def eight_bit_dtype(kind: str) -> jnp.dtype:
    """Return the dtype of the array that stores "int8" or "e4m3" elements on the default backend."""
    if kind == "int8":
        return jnp.dtype(jnp.int8)
    return jnp.dtype(jnp.uint8) if jax.default_backend() == "cpu" else E4M3


def _decode(stored: jax.Array) -> jax.Array:
    """Convert 8-bit elements, as a page stores them, to float32, without applying scale and bias."""
    if stored.dtype != jnp.uint8:
        return stored.astype(jnp.float32)
    # Through float16, which has the same layout but for wider exponent and mantissa: half the time of XLA:CPU's cast.
    bits = stored.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return jnp.where(bits & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 2.0**8)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate ``x[..., H]`` as RoPE does, channel i with channel ``i + H / 2``, by angles with these cos and sin."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
