"""Tensor parallelism: one device's part of the network, and the collectives that join the parts' results.

As in Megatron (https://arxiv.org/abs/1909.08053), each device has some of the heads, some of the MLP's inner columns
and some rows of the vocabulary. It computes its part of a sum after attention and after the MLP, and these sums are all
that a layer exchanges. Before the layers look-ups are summed, and after them logits are gathered.

All this runs inside a ``shard_map`` over the mesh axis, so that no collectives exist but those written here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from qwen_jax.quantization import QuantizedTensor, rows

HALF_MULTIPLE = 128  # tokens that divide half a row: whole pages, and whole blocks of queries


@dataclass(frozen=True)
class Partition:
    """Description of a device's part of the network in tensor parallelism, or of the whole network.

    Attributes:
      axis: the mesh axis whose devices have the parts; None for a whole network, which exchanges nothing.
      size: number of devices on the axis.
      scatter_from: number of tokens in a step from which each device keeps the hidden states of its share of each row's
        tokens between products (sequence parallelism, https://arxiv.org/abs/2205.05198): sums become reduce-scatters
        and all-gathers, as many bytes, and work on single tokens (norms, sums with the residual) is divided, as is the
        memory for it. 0 for never.
      overlap_from: number of tokens in a step from which each row's tokens go through the layers in two halves, by
        turns: while devices exchange the sums of one half, they compute the other's. 0 for never.
      scattered: whether devices keep a share of the tokens in the present step.
      halved: whether tokens go through the layers in halves in the present step.
    """

    axis: str | None = None
    size: int = 1
    scatter_from: int = 0
    overlap_from: int = 0
    scattered: bool = False
    halved: bool = False

    def for_step(self, tokens: jax.Array) -> Partition:
        """Return the partition with ``scattered`` and ``halved`` set as suits a step of ``tokens[B, T]``.

        Both need many tokens in the step, and a T that divides evenly.
        """
        if self.axis is None:
            return self
        halved = 0 < self.overlap_from <= tokens.size and tokens.shape[1] % (2 * HALF_MULTIPLE) == 0
        whole = self.size * (1 + halved)
        scattered = 0 < self.scatter_from <= tokens.size and tokens.shape[1] % whole == 0
        return replace(self, scattered=scattered, halved=halved)

    def token_slices(self, tokens: int) -> list[slice]:
        """Return the slices of each row's tokens that go through a layer together: two halves if halved, else one."""
        half = tokens // 2
        return [slice(0, half), slice(half, tokens)] if self.halved else [slice(0, tokens)]

    def lookup(self, table: jax.Array | QuantizedTensor, tokens: jax.Array, dtype) -> jax.Array:
        """Look up the embeddings of tokens in a table ``[V, D]`` of which this device has ``[V / size, D]``.

        Returns ``[B, T, D]``, or this device's share as `summed` does.
        """
        if self.axis is None:
            return rows(table, tokens, dtype)
        local_rows = table.shape[0]
        index = tokens - jax.lax.axis_index(self.axis) * local_rows
        values = rows(table, jnp.clip(index, 0, local_rows - 1), dtype)
        return self.summed(jnp.where(((index >= 0) & (index < local_rows))[..., None], values, 0))

    def summed(self, x: jax.Array) -> jax.Array:
        """Sum ``x[B, T, D]`` over the devices; where scattered, return this device's share ``[B, T / size, D]``."""
        if self.axis is None:
            return x
        if self.scattered:
            return jax.lax.psum_scatter(x, self.axis, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x, self.axis)

    def share(self, x: jax.Array) -> jax.Array:
        """Return this device's share ``[B, T / size, D]`` of hidden states that all devices have, where scattered."""
        if not self.scattered:
            return x
        size = x.shape[1] // self.size
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * size, size, axis=1)

    def gathered(self, x: jax.Array) -> jax.Array:
        """Return hidden states ``[B, T, D]`` of all tokens: gathered from the devices' shares, where scattered."""
        return jax.lax.all_gather(x, self.axis, axis=1, tiled=True) if self.scattered else x

    def gathered_logits(self, x: jax.Array, vocab: int) -> jax.Array:
        """Return logits ``[n, vocab]``, gathered from every device's ``[n, V / size]``, without padding entries."""
        if self.axis is not None:
            x = jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        return x[:, :vocab]

    def any_trip(self, trips: jax.Array) -> jax.Array:
        """Return, for each row, the earliest trip on any device, i32 ``[R]``; 0 stands for none.

        A trip is 1 + the first layer in which a row's numbers became unusable, such as out of their 8-bit range.
        """
        if self.axis is None:
            return trips
        none = jnp.iinfo(jnp.int32).max
        first = jax.lax.pmin(jnp.where(trips == 0, none, trips), self.axis)
        return jnp.where(first == none, 0, first)

    def total(self, x: jax.Array) -> jax.Array:
        """Return the sum of counts ``x`` over the devices that share the network."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)


WHOLE = Partition()
