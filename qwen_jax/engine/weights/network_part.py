"""Parts of a shard's network for which programs are compiled alone: blocks of layers, and what is before and after."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from qwen_jax.model import Qwen2

LAYERS = 8  # of a block: a program of more layers is hardly faster, and takes longer to trace and to compile
SPARSE_LAYERS = 4  # of a block in sparse attention, whose layers take several times as long to compile


class NetworkPart(NamedTuple):
    """A part of a shard's network, as a graph and the places of its arrays among all of the shard's.

    Attributes:
      graph, treedef: graph definition of the network; tree structure of its state and the scales of its 8-bit pages.
      places: place in the shard's arrays of each array of the part.
    """

    graph: Any
    treedef: Any
    places: tuple[int, ...]

    def leaves(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Return the part's arrays out of the shard's."""
        return tuple([leaves[place] for place in self.places])

    def network(self, leaves: Sequence[Any]) -> tuple[Qwen2, Any]:
        """Return the network around the part's arrays, and the scales of its 8-bit pages."""
        params, scales = jax.tree.unflatten(self.treedef, leaves)
        return nnx.merge(self.graph, params), scales


def network_part(model: Qwen2, scales: Any, shard_leaves: Sequence[Any]) -> NetworkPart:
    """Return a network as a part of the shard that has ``shard_leaves``, among which its arrays or shapes are."""
    graph, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten((state, scales))
    places = {id(leaf): place for place, leaf in enumerate(shard_leaves)}
    return NetworkPart(graph, treedef, tuple(places[id(leaf)] for leaf in leaves))


def divide(kinds: Sequence[Hashable], layers: int, exact: bool = False) -> list[tuple[int, int]]:
    """Divide layers into blocks ``(start, end)`` of layers of one kind, as few different ones as possible.

    kinds: kind of each layer; programs of layers of one kind are alike. layers: about how many a block has; at most as
    many if ``exact``.
    """
    blocks, start = [], 0
    while start < len(kinds):
        end = next((at for at in range(start, len(kinds)) if kinds[at] != kinds[start]), len(kinds))
        for size in _sizes(end - start, layers, exact):
            blocks.append((start, start + size))
            start += size
    return blocks


def _sizes(count: int, layers: int, exact: bool) -> list[int]:
    """Return the sizes of the blocks of ``count`` equal layers, of which no two differ by more than one."""
    near = range(layers - layers // 4, layers + 1 if exact else layers + layers // 2 + 1)
    even = [size for size in near if count % size == 0]  # blocks of one size share one program
    if even:
        size = min(even, key=lambda size: abs(size - layers))
        return [size] * (count // size)
    blocks = -(-count // layers)
    return [count // blocks + (index < count % blocks) for index in range(blocks)]
