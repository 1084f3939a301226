"""The contents of pages, and of slots, off one replica's devices and onto another's, whatever their plans.

They pass through the host a few at a time, in the model's own heads: without copies and padding, all layers of all
stages. Programs for both ways are compiled with the others of a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.compiled.state import EngineState
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.stage import Stage
from qwen_jax.parallel.layout import Layout, contract, expand

AT_ONCE = 16  # pages, and slots
FIELDS = ("k_pages", "v_pages", "draft_k_pages", "draft_v_pages", "summaries")
AXES = ("page", "kv_heads")


class Contents(NamedTuple):
    """Of some pages, by field of the state: for every layer of the model ``[n, K, ...]``; and of some slots, the
    counted tokens i32 ``[m, V]``."""

    pages: dict[str, list[np.ndarray]]
    counts: np.ndarray

    def of(self, pages: list[int], slots: list[int]) -> Contents:
        """Some of them."""
        return Contents({name: [x[pages] for x in found] for name, found in self.pages.items()}, self.counts[slots])


class KVTransfer:
    """Reads and writes one stage's state."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        ids = jax.ShapeDtypeStruct((AT_ONCE,), jnp.int32, sharding=stage.part.replicated)
        where = jax.tree.map(lambda x: x.sharding, stage.shapes)
        pages = {name: getattr(where, name) for name in FIELDS}
        read = jax.jit(_read, out_shardings=(pages, where.token_counts)).lower(stage.shapes, ids, ids)
        values = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                              jax.eval_shape(_read, stage.shapes, ids, ids), (pages, where.token_counts))
        write = jax.jit(_write, out_shardings=where, donate_argnums=0).lower(stage.shapes, ids, ids, *values)
        self._read, self._write, self._where = read.compile(), write.compile(), (pages, where.token_counts)

    def layout(self, name: str) -> Layout:
        return self.stage.draft_layout if name.startswith("draft") else self.stage.part.layout

    def read(self, pages: np.ndarray, slots: np.ndarray) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
        """Of `AT_ONCE` pages and slots, in the model's heads."""
        found, counts = jax.device_get(self._read(self.stage.state, pages, slots))
        return {name: [contract(x, AXES, self.layout(name)) for x in found[name]] for name in FIELDS}, counts

    def write(self, pages: np.ndarray, slots: np.ndarray, values: dict[str, list[np.ndarray]], counts) -> None:
        held = {name: tuple(expand(x, AXES, self.layout(name)) for x in values[name]) for name in FIELDS}
        placed = jax.tree.map(jax.device_put, (held, counts), self._where)
        self.stage.state = self._write(self.stage.state, pages, slots, *placed)


def _read(state: EngineState, pages: jax.Array, slots: jax.Array):
    return {name: tuple(x[pages] for x in getattr(state, name)) for name in FIELDS}, state.token_counts[slots]


def _write(state: EngineState, pages: jax.Array, slots: jax.Array, values, counts) -> EngineState:
    written = {name: tuple(x.at[pages].set(new) for x, new in zip(getattr(state, name), values[name], strict=True))
               for name in FIELDS}
    return state._replace(token_counts=state.token_counts.at[slots].set(counts), **written)


def read(runner: Runner, pages: Sequence[int], slots: Sequence[int]) -> Contents:
    """What a replica holds in these pages and slots."""
    parts: list[tuple[list[dict], list[np.ndarray]]] = []
    for mover in runner.movers:
        found = [mover.read(*ids) for ids in _turns(pages, slots)]
        parts.append(([pages for pages, _ in found], [counts for _, counts in found]))
    joined = {name: [np.concatenate([turn[name][layer] for turn in turns])[:len(pages)]
                     for turns, _ in parts for layer in range(len(turns[0][name]) if turns else 0)] for name in FIELDS}
    counts = parts[-1][1]
    return Contents(joined, np.concatenate(counts)[:len(slots)] if counts else np.zeros((0, 0), np.int32))


def write(runner: Runner, pages: Sequence[int], slots: Sequence[int], contents: Contents) -> None:
    """Contents of so many pages and slots into these of a replica."""
    for mover in runner.movers:
        part = mover.stage.part
        layers = slice(part.start, part.end)
        for turn, (page_ids, slot_ids) in enumerate(_turns(pages, slots)):
            here = slice(turn * AT_ONCE, (turn + 1) * AT_ONCE)
            values = {name: [_filled(x[here]) for x in (found if name.startswith("draft") else found[layers])]
                      for name, found in contents.pages.items()}
            counts = contents.counts[here] if part.last else np.zeros((0, contents.counts.shape[1]), np.int32)
            mover.write(page_ids, slot_ids, values, _filled(counts))


def _turns(pages: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids by the `AT_ONCE`. What fills them up is page 0, which belongs to nobody, and the last slot, which is of
    padding rows."""
    for at in range(0, max(len(pages), len(slots)), AT_ONCE):
        yield (np.array([*pages[at:at + AT_ONCE], *[0] * AT_ONCE][:AT_ONCE], np.int32),
               np.array([*slots[at:at + AT_ONCE], *[-1] * AT_ONCE][:AT_ONCE], np.int32))


def _filled(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.zeros((AT_ONCE - len(x), *x.shape[1:]), x.dtype)])
