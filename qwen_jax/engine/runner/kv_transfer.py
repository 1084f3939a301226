"""Copies of pages and token counts between two replicas, which may divide the model over their devices differently.

A page holds keys and values; a slot is the row of token counts that a running sequence has. Both pass through the
host, `AT_ONCE` at a time. There, pages have the model's own KV heads, without copies and padding, of all layers of
all stages. Programs for both directions are compiled with the other programs of a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.compiled.state import EngineState
from qwen_jax.engine.runner.stage import Stage
from qwen_jax.engine.scheduling.page_pool import NULL_PAGE
from qwen_jax.parallel.layout import Layout, contract, expand

AT_ONCE = 16  # pages, and slots, that a program moves
FIELDS = ("k_pages", "v_pages", "draft_k_pages", "draft_v_pages", "summaries")
AXES = ("page", "kv_heads")


class Contents(NamedTuple):
    """Contents of n pages of keys and values, and the token counts in m slots, on the host.

    Attributes:
      pages: for each of `FIELDS` of the `EngineState`, arrays ``[n, K, ...]`` of every layer of the model.
      counts: how often each token id occurs in the sequence of each slot, i32 ``[m, V]``.
    """

    pages: dict[str, list[np.ndarray]]
    counts: np.ndarray

    def select(self, pages: Sequence[int], slots: Sequence[int]) -> Contents:
        """Return the contents of some of these pages and slots, given by their indices in the arrays."""
        pages, slots = list(pages), list(slots)
        return Contents({name: [x[pages] for x in layers] for name, layers in self.pages.items()}, self.counts[slots])


class KVTransfer:
    """Compiled programs that read and write pages and token counts on the devices of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        ids = jax.ShapeDtypeStruct((AT_ONCE,), jnp.int32, sharding=stage.shard.replicated)
        state_shardings = jax.tree.map(lambda x: x.sharding, stage.shapes)
        self._shardings = ({name: getattr(state_shardings, name) for name in FIELDS}, state_shardings.token_counts)
        values = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                              jax.eval_shape(_read, stage.shapes, ids, ids), self._shardings)
        self._read = jax.jit(_read, out_shardings=self._shardings).lower(stage.shapes, ids, ids).compile()
        self._write = jax.jit(_write, out_shardings=state_shardings, donate_argnums=0).lower(
            stage.shapes, ids, ids, *values).compile()

    def read(self, pages: np.ndarray, slots: np.ndarray) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
        """Copy `AT_ONCE` pages, in the model's own KV heads, and the token counts of `AT_ONCE` slots to the host."""
        stored, counts = jax.device_get(self._read(self.stage.state, pages, slots))
        return {name: [contract(x, AXES, self._layout(name)) for x in stored[name]] for name in FIELDS}, counts

    def write(self, pages: np.ndarray, slots: np.ndarray, values: dict[str, list[np.ndarray]], counts) -> None:
        """Write `AT_ONCE` pages, in the model's own KV heads, and token counts of `AT_ONCE` slots to the devices."""
        stored = {name: tuple(expand(x, AXES, self._layout(name)) for x in values[name]) for name in FIELDS}
        on_devices = jax.tree.map(jax.device_put, (stored, counts), self._shardings)
        self.stage.state = self._write(self.stage.state, pages, slots, *on_devices)

    def _layout(self, field: str) -> Layout:
        return self.stage.draft_layout if field.startswith("draft") else self.stage.shard.layout


def read(transfers: Sequence[KVTransfer], pages: Sequence[int], slots: Sequence[int]) -> Contents:
    """Copy pages and token counts from a replica to the host; ``transfers`` are those of its stages in order."""
    groups = [[transfer.read(*ids) for ids in _groups(pages, slots)] for transfer in transfers]
    joined = {name: [np.concatenate([contents[name][layer] for contents, _ in of_stage])[:len(pages)]
                     for of_stage in groups for layer in range(len(of_stage[0][0][name]) if of_stage else 0)]
              for name in FIELDS}
    counts = [counts for _, counts in groups[-1]]  # the last stage counts the tokens
    return Contents(joined, np.concatenate(counts)[:len(slots)] if counts else np.zeros((0, 0), np.int32))


def write(transfers: Sequence[KVTransfer], pages: Sequence[int], slots: Sequence[int], contents: Contents) -> None:
    """Write contents to as many pages and slots of a replica; ``transfers`` are those of its stages in order."""
    for transfer in transfers:
        shard = transfer.stage.shard
        layers = slice(shard.start, shard.end)
        for number, (page_ids, slot_ids) in enumerate(_groups(pages, slots)):
            group = slice(number * AT_ONCE, (number + 1) * AT_ONCE)
            values = {name: [_padded(x[group]) for x in (arrays if name.startswith("draft") else arrays[layers])]
                      for name, arrays in contents.pages.items()}
            counts = contents.counts[group] if shard.last else np.zeros((0, contents.counts.shape[1]), np.int32)
            transfer.write(page_ids, slot_ids, values, _padded(counts))


def _read(state: EngineState, pages: jax.Array, slots: jax.Array):
    return {name: tuple(x[pages] for x in getattr(state, name)) for name in FIELDS}, state.token_counts[slots]


def _write(state: EngineState, pages: jax.Array, slots: jax.Array, values, counts) -> EngineState:
    written = {name: tuple(x.at[pages].set(new) for x, new in zip(getattr(state, name), values[name], strict=True))
               for name in FIELDS}
    return state._replace(token_counts=state.token_counts.at[slots].set(counts), **written)


def _groups(pages: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield arrays of `AT_ONCE` page ids and slot ids, filled up with the page and the slot of padding rows."""
    for start in range(0, max(len(pages), len(slots)), AT_ONCE):
        yield (np.array([*pages[start:start + AT_ONCE], *[NULL_PAGE] * AT_ONCE][:AT_ONCE], np.int32),
               np.array([*slots[start:start + AT_ONCE], *[-1] * AT_ONCE][:AT_ONCE], np.int32))


def _padded(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.zeros((AT_ONCE - len(x), *x.shape[1:]), x.dtype)])
