"""Layouts of a model's parameters on the devices of the ``tensor`` axis, for any number of devices.

A device holds whole KV slots: a key head, a value head and some of the query heads that attend to them. Where the KV
heads do not divide by the devices, heads are copied, each copy with a part of the head's queries, or slots without a
head are added; places for queries that no head fills stay zero. The MLP's and the vocabulary's axes are padded with
zeros. Zeros give zeros all the way through the network, so no logit changes, and `contract` is the exact inverse of
`expand`: padding never reaches a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import check_positive_integer
from qwen_jax.quantization import QuantizedTensor


@dataclass(frozen=True)
class Layout:
    """Sizes of a model's heads, MLP and vocabulary, padded so that they divide over tensor-parallel devices.

    Attributes:
      tensor: number of devices, which divides ``slots``, ``mlp`` and ``vocab``.
      config: the model, unpadded.
      copies: number of copies of each KV head.
      slots: number of KV slots: the copies, and slots without a head.
      group: number of places for query heads in each slot.
      mlp: padded size of the MLP's inner axis.
      vocab: padded size of the vocabulary.
    """

    tensor: int
    config: ModelConfig
    copies: int
    slots: int
    group: int
    mlp: int
    vocab: int

    @cached_property
    def heads(self) -> np.ndarray:
        """Index of the KV head in each KV slot, int ``[slots]``; -1 for a slot without one. Copies are neighbours."""
        heads = np.full(self.slots, -1)
        used = self.config.num_kv_heads * self.copies
        heads[:used] = np.arange(used) // self.copies
        return heads

    @cached_property
    def queries(self) -> np.ndarray:
        """Index, within its KV head's group, of the query head in each place, int ``[slots, group]``; -1 for none."""
        first = np.arange(self.slots) % self.copies * self.group
        queries = first[:, None] + np.arange(self.group)
        return np.where((self.heads[:, None] >= 0) & (queries < self.config.group_size), queries, -1)

    @property
    def unchanged(self) -> bool:
        """True if the layout neither pads nor copies anything, so that `expand` changes nothing."""
        config = self.config
        return (self.slots, self.group, self.mlp, self.vocab) == (config.num_kv_heads, config.group_size,
                                                                  config.intermediate_size, config.vocab_size)

    @property
    def waste(self) -> dict[str, float]:
        """Fraction by which padding and copies enlarge the model's query heads, KV heads, MLP and vocabulary."""
        config = self.config
        return {"query_heads": self.slots * self.group / config.num_heads - 1,
                "kv_heads": self.slots / config.num_kv_heads - 1,
                "mlp": self.mlp / config.intermediate_size - 1, "vocabulary": self.vocab / config.vocab_size - 1}

    @property
    def local(self) -> ModelConfig:
        """Configuration of a device's part of the network, as a model of its own with the whole vocabulary."""
        slots = self.slots // self.tensor
        return replace(self.config, num_kv_heads=slots, num_heads=slots * self.group,
                       intermediate_size=self.mlp // self.tensor)

    def __str__(self) -> str:
        return f"{self.slots} KV slots ({self.copies} of each head) of {self.group} query heads"


def layouts(config: ModelConfig, tensor: int) -> list[Layout]:
    """Return every layout worth considering on ``tensor`` devices, the one with the fewest KV slots first.

    A layout is left out if another has neither more slots nor more query heads. Raises UserError if ``tensor`` is not a
    positive integer.
    """
    check_positive_integer("the degree of tensor parallelism", tensor)
    best: list[Layout] = []
    for group in range(config.group_size, 0, -1):
        copies = -(-config.group_size // group)
        layout = Layout(tensor, config, copies, slots=_padded(config.num_kv_heads * copies, tensor), group=group,
                        mlp=_padded(config.intermediate_size, tensor), vocab=_padded(config.vocab_size, tensor))
        if not any(_at_most(known, layout) for known in best):
            best = [known for known in best if not _at_most(layout, known)] + [layout]
    return sorted(best, key=lambda layout: layout.slots)


def _at_most(a: Layout, b: Layout) -> bool:
    """Return whether layout ``a`` has no more KV slots and no more query heads than layout ``b``."""
    return a.slots <= b.slots and a.slots * a.group <= b.slots * b.group


def best_layout(config: ModelConfig, tensor: int, cached_tokens: int) -> Layout:
    """Return the layout whose decode step reads the least memory, among equals the one with the fewest slots.

    A step reads the attention's matrices, and the keys and values of ``cached_tokens`` in all its sequences together.
    """
    def read(layout: Layout) -> int:  # elements per layer and head dimension, on all devices
        heads = layout.slots * layout.group
        return (2 * heads + 2 * layout.slots) * config.hidden_size + 2 * layout.slots * cached_tokens

    return min(layouts(config, tensor), key=read)


def expand(value: np.ndarray | QuantizedTensor, axes: Sequence[str], layout: Layout) -> np.ndarray | QuantizedTensor:
    """Pad a parameter with these logical axes (see model.abstract), and copy its KV heads, as ``layout`` says.

    "kv_heads" and "group" are neighbours; a group of G heads, or of G + 2 with key and value, is known by its size.
    """
    if isinstance(value, QuantizedTensor):
        scale = expand(value.scale, axes[:value.scale.ndim], layout)
        # What is added has scale 1, as every channel of zeros has.
        return replace(value, values=expand(value.values, axes, layout), scale=np.where(scale == 0, 1, scale))
    for axis, name in enumerate(axes):
        if name == "kv_heads":
            grouped = axes[axis + 1:axis + 2] == ("group",)
            value = _take_heads(value, axis, _places(layout, value.shape[axis + 1] if grouped else None))
        elif name in ("mlp", "vocab"):
            value = _resized(value, axis, getattr(layout, name))
    return value


def contract(value: np.ndarray | QuantizedTensor, axes: Sequence[str], layout: Layout) -> np.ndarray | QuantizedTensor:
    """Remove padding and copies from a parameter that `expand` made: the exact inverse of `expand`."""
    config = layout.config
    if isinstance(value, QuantizedTensor):
        return replace(value, values=contract(value.values, axes, layout),
                       scale=contract(value.scale, axes[:value.scale.ndim], layout))
    for axis, name in enumerate(axes):
        if name == "kv_heads":
            grouped = axes[axis + 1:axis + 2] == ("group",)
            extra = value.shape[axis + 1] - layout.group if grouped else None
            places = _places(layout, config.group_size + extra if grouped else None)
            own = (config.num_kv_heads, config.group_size + extra) if grouped else (config.num_kv_heads,)
            value = _take_heads(value, axis, _inverse(places, own))
        elif name in ("mlp", "vocab"):
            value = _resized(value, axis, config.intermediate_size if name == "mlp" else config.vocab_size)
    return value


def _places(layout: Layout, group: int | None) -> np.ndarray:
    """Return which head of the model, or row of a head's group, each place of a layout holds; -1 for none.

    Heads and rows are numbered as in the flattened parameter.

    Shape ``[slots]`` for ``group`` None; else each head has ``group`` rows, the last of which (key and value) all its
    copies share, and the shape is ``[slots, places of a slot]``.
    """
    if group is None:
        return layout.heads
    own = layout.config.group_size
    shared = np.broadcast_to(np.arange(own, group), (layout.slots, group - own))
    rows = np.concatenate([layout.queries, shared], axis=1)
    return np.where((rows >= 0) & (layout.heads[:, None] >= 0), layout.heads[:, None] * group + rows, -1)


def _inverse(places: np.ndarray, own: tuple[int, ...]) -> np.ndarray:
    """Return the first place of a layout that holds each head or row of the model, in the shape ``own``."""
    known, first = np.unique(places.ravel(), return_index=True)
    return first[known >= 0].reshape(own)


def _take_heads(value: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Gather heads: take flat indices ``places`` of the axes of ``value`` from ``axis`` on; zeros for -1."""
    flat = value.reshape(*value.shape[:axis], -1, *value.shape[axis + places.ndim:])
    taken = np.take(flat, places.ravel(), axis=axis)  # -1 takes the last row, which is zeroed below
    taken[(slice(None),) * axis + (places.ravel() < 0,)] = 0
    return taken.reshape(*value.shape[:axis], *places.shape, *value.shape[axis + places.ndim:])


def _resized(value: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return ``value`` with one axis cut off at the end, or padded with zeros, to ``size``."""
    if size <= value.shape[axis]:
        return value[(slice(None),) * axis + (slice(size),)]
    new = np.zeros((*value.shape[:axis], size, *value.shape[axis + 1:]), value.dtype)
    new[(slice(None),) * axis + (slice(value.shape[axis]),)] = value
    return new


def expanded_shape(shape: Sequence[int], axes: Sequence[str], layout: Layout) -> tuple[int, ...]:
    """Return the shape that `expand` gives a parameter of ``shape``."""
    sizes = {"kv_heads": layout.slots, "mlp": layout.mlp, "vocab": layout.vocab}
    more = layout.group - layout.config.group_size
    return tuple(sizes.get(name, size + more if name == "group" else size)
                 for name, size in zip(axes, shape, strict=True))


def _padded(size: int, tensor: int) -> int:
    """Return ``size`` rounded up to a multiple of ``tensor``."""
    return -(-size // tensor) * tensor
