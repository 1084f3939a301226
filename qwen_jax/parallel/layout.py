"""How a model's parameters are spread over the devices of the ``tensor`` axis, for any number of these.

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
from qwen_jax.errors import UserError
from qwen_jax.quantization import FP8Tensor


@dataclass(frozen=True)
class Layout:
    """Sizes on all devices together, of one model.

    Attributes:
      tensor: devices; it divides all sizes.
      config: of the model, unpadded.
      copies: of each KV head.
      slots: KV slots: the copies and slots without a head.
      group: query heads per slot, as many as the largest part of a group has.
      mlp, vocab: padded sizes.
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
        """int ``[slots]``: the KV head in each slot, -1 for none. Copies of a head are neighbours."""
        heads = np.full(self.slots, -1)
        used = self.config.num_kv_heads * self.copies
        heads[:used] = np.arange(used) // self.copies
        return heads

    @cached_property
    def queries(self) -> np.ndarray:
        """int ``[slots, group]``: which query head of its group is in each place, -1 for none."""
        first = np.arange(self.slots) % self.copies * self.group
        queries = first[:, None] + np.arange(self.group)
        return np.where((self.heads[:, None] >= 0) & (queries < self.config.group_size), queries, -1)

    @property
    def unchanged(self) -> bool:
        """Whether `expand` changes nothing."""
        one = self.config
        return (self.slots, self.group, self.mlp, self.vocab) == (one.num_kv_heads, one.group_size,
                                                                  one.intermediate_size, one.vocab_size)

    @property
    def waste(self) -> dict[str, float]:
        """What is computed or stored beyond the model's own, as fractions of it: query heads, KV heads, MLP columns
        and rows of the vocabulary."""
        one = self.config
        return {"query_heads": self.slots * self.group / one.num_heads - 1,
                "kv_heads": self.slots / one.num_kv_heads - 1,
                "mlp": self.mlp / one.intermediate_size - 1, "vocabulary": self.vocab / one.vocab_size - 1}

    @property
    def local(self) -> ModelConfig:
        """One device's part of the network as a model of its own; its vocabulary is the whole one."""
        slots = self.slots // self.tensor
        return replace(self.config, num_kv_heads=slots, num_heads=slots * self.group,
                       intermediate_size=self.mlp // self.tensor)

    def __str__(self) -> str:
        return f"{self.slots} KV slots ({self.copies} of each head) of {self.group} query heads"


def layouts(config: ModelConfig, tensor: int) -> list[Layout]:
    """Every layout worth considering, that with the fewest KV slots first: none has at most as many slots and query
    heads as another. UserError for a degree that is no positive integer."""
    if isinstance(tensor, bool) or not isinstance(tensor, int) or tensor < 1:
        raise UserError(f"the degree of tensor parallelism must be a positive integer, not {tensor!r}")
    found: list[Layout] = []
    for group in range(config.group_size, 0, -1):
        copies = -(-config.group_size // group)
        one = Layout(tensor, config, copies, _padded(config.num_kv_heads * copies, tensor), group,
                     _padded(config.intermediate_size, tensor), _padded(config.vocab_size, tensor))
        if not any(_at_most(other, one) for other in found):
            found = [other for other in found if not _at_most(one, other)] + [one]
    return sorted(found, key=lambda one: one.slots)


def _at_most(one: Layout, other: Layout) -> bool:
    return one.slots <= other.slots and one.slots * one.group <= other.slots * other.group


def best_layout(config: ModelConfig, tensor: int, cached_tokens: int) -> Layout:
    """The layout whose decode step reads the least: the attention's matrices, and the keys and values of
    ``cached_tokens`` in all its rows together. Of equals the one with the fewest slots."""
    def read(layout: Layout) -> int:  # elements per layer and head dimension, on all devices
        heads = layout.slots * layout.group
        return (2 * heads + 2 * layout.slots) * config.hidden_size + 2 * layout.slots * cached_tokens

    return min(layouts(config, tensor), key=read)


def whole(config: ModelConfig) -> Layout:
    """For a single device: the model as it is."""
    return layouts(config, 1)[0]


def expand(value: np.ndarray | FP8Tensor, axes: Sequence[str], layout: Layout) -> np.ndarray | FP8Tensor:
    """A parameter, ``[...]`` with these logical axes (see model.abstract), as ``layout`` holds it.

    "kv_heads" and "group" are neighbours; a group of G heads, or of G + 2 with key and value, is known by its size.
    """
    if isinstance(value, FP8Tensor):
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


def contract(value: np.ndarray | FP8Tensor, axes: Sequence[str], layout: Layout) -> np.ndarray | FP8Tensor:
    """The inverse of `expand`."""
    config = layout.config
    if isinstance(value, FP8Tensor):
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
    """For every place the flat index of what of the model is in it, -1 for nothing: int ``[slots]``, or ``[slots, g]``
    where each head has ``group`` rows, the last of which (key and value) all copies share."""
    if group is None:
        return layout.heads
    own = layout.config.group_size
    shared = np.broadcast_to(np.arange(own, group), (layout.slots, group - own))
    rows = np.concatenate([layout.queries, shared], axis=1)
    return np.where((rows >= 0) & (layout.heads[:, None] >= 0), layout.heads[:, None] * group + rows, -1)


def _inverse(places: np.ndarray, own: tuple[int, ...]) -> np.ndarray:
    """For everything of the model, the first place that holds it."""
    known, first = np.unique(places.ravel(), return_index=True)
    return first[known >= 0].reshape(own)


def _take_heads(value: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """``value`` whose axes from ``axis`` on, as many as ``places`` has, hold what ``places`` says; zeros for -1."""
    flat = value.reshape(*value.shape[:axis], -1, *value.shape[axis + places.ndim:])
    taken = np.take(flat, places.ravel(), axis=axis)  # -1 takes the last, which is replaced below
    taken[(slice(None),) * axis + (places.ravel() < 0,)] = 0
    return taken.reshape(*value.shape[:axis], *places.shape, *value.shape[axis + places.ndim:])


def _resized(value: np.ndarray, axis: int, size: int) -> np.ndarray:
    """``value`` cut off or filled up with zeros at the end of an axis."""
    if size <= value.shape[axis]:
        return value[(slice(None),) * axis + (slice(size),)]
    new = np.zeros((*value.shape[:axis], size, *value.shape[axis + 1:]), value.dtype)
    new[(slice(None),) * axis + (slice(value.shape[axis]),)] = value
    return new


def expanded_shape(shape: Sequence[int], axes: Sequence[str], layout: Layout) -> tuple[int, ...]:
    """The shape that `expand` gives a parameter of ``shape``."""
    sizes = {"kv_heads": layout.slots, "mlp": layout.mlp, "vocab": layout.vocab}
    more = layout.group - layout.config.group_size
    return tuple(sizes.get(name, size + more if name == "group" else size)
                 for name, size in zip(axes, shape, strict=True))


def _padded(size: int, tensor: int) -> int:
    return -(-size // tensor) * tensor
