"""A device's part of the network in tensor parallelism, and where it has to talk to the others.

Megatron's way (https://arxiv.org/abs/1909.08053): each device has some of the heads, some of the MLP's inner columns
and some rows of the vocabulary. It computes its part of a sum after attention and after the MLP, and these sums are all
that a layer exchanges. Before and after the layers, look-ups and logits are put together.

All this runs inside a ``shard_map`` over the axis, so that the collectives are those written here and no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from qwen_jax.quantization import FP8Tensor, rows

HALF_MULTIPLE = 128  # tokens of a row: whole pages, and whole blocks of queries


@dataclass(frozen=True)
class Partition:
    """A whole network, or one device's part of it.

    Attributes:
      axis: the mesh axis whose devices have the parts; None for a whole network, which exchanges nothing.
      size: devices on it.
      scatter_from: with as many tokens in a step or more, devices keep the hidden states of their share of each row's
        tokens between products (sequence parallelism, https://arxiv.org/abs/2205.05198): sums become reduce-scatters
        and all-gathers, as many bytes, and what is done to each token alone (norms, sums with the residual) is
        divided, as is the memory for it. 0 for never.
      overlap_from: with as many tokens in a step or more, each row's tokens go through the layers in two halves, by
        turns: while devices exchange one half's sums, they compute the other's. 0 for never.
      scattered: whether devices keep a share of the tokens now; halved: whether they go in halves.
    """

    axis: str | None = None
    size: int = 1
    scatter_from: int = 0
    overlap_from: int = 0
    scattered: bool = False
    halved: bool = False

    def for_step(self, tokens: jax.Array) -> Partition:
        """For a step of these tokens ``[B, T]``: scattered and halved if they are many, and T divides."""
        if self.axis is None:
            return self
        halved = 0 < self.overlap_from <= tokens.size and tokens.shape[1] % (2 * HALF_MULTIPLE) == 0
        whole = self.size * (1 + halved)
        scattered = 0 < self.scatter_from <= tokens.size and tokens.shape[1] % whole == 0
        return replace(self, scattered=scattered, halved=halved)

    def slices(self, tokens: int) -> list[slice]:
        """Of the tokens of each row, those that go through a layer together."""
        half = tokens // 2
        return [slice(0, half), slice(half, tokens)] if self.halved else [slice(0, tokens)]

    def lookup(self, table: jax.Array | FP8Tensor, tokens: jax.Array, dtype) -> jax.Array:
        """Rows ``[B, T, D]`` of a table of which this device has the rows ``[V / size, D]``; `joined`."""
        if self.axis is None:
            return rows(table, tokens, dtype)
        here = table.shape[0]
        place = tokens - jax.lax.axis_index(self.axis) * here
        found = rows(table, jnp.clip(place, 0, here - 1), dtype)
        return self.joined(jnp.where(((place >= 0) & (place < here))[..., None], found, 0))

    def joined(self, x: jax.Array) -> jax.Array:
        """The sum ``[B, T, D]`` over the devices; the share of this device ``[B, T / size, D]`` where scattered."""
        if self.axis is None:
            return x
        if self.scattered:
            return jax.lax.psum_scatter(x, self.axis, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x, self.axis)

    def share(self, x: jax.Array) -> jax.Array:
        """This device's share of hidden states ``[B, T, D]`` that all devices have: what `joined` gives."""
        if not self.scattered:
            return x
        size = x.shape[1] // self.size
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * size, size, axis=1)

    def gathered(self, x: jax.Array) -> jax.Array:
        """Hidden states of all tokens ``[B, T, D]``, from what `joined` gives."""
        return jax.lax.all_gather(x, self.axis, axis=1, tiled=True) if self.scattered else x

    def whole_logits(self, x: jax.Array, vocab: int) -> jax.Array:
        """Logits ``[n, vocab]`` from every device's ``[n, V / size]``; rows that only fill up are cut off."""
        if self.axis is not None:
            x = jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        return x[:, :vocab]

    def any_trip(self, trips: jax.Array) -> jax.Array:
        """i32 ``[R]``: over the devices the smallest number that is not 0, or 0."""
        if self.axis is None:
            return trips
        none = jnp.iinfo(jnp.int32).max
        first = jax.lax.pmin(jnp.where(trips == 0, none, trips), self.axis)
        return jnp.where(first == none, 0, first)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of some counts over the devices."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)


WHOLE = Partition()
