"""Forward pass of a batch through the layers: hidden states, with keys and values written to their pages."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from qwen_kernels.attention import EightBitPages, paged_attention, write_pages
from qwen_kernels.sparse_attention import sparse_attention, update_summaries, visible_pages

from qwen_jax.engine.compiled.lora_rows import adapt_rows
from qwen_jax.engine.compiled.numeric_guard import Guard, damaged_weights, earlier_trip
from qwen_jax.engine.compiled.state import EngineState, LayerOutput, Models, StepBatch, StepOutput

Output = TypeVar("Output", LayerOutput, StepOutput)


def forward(models: Models, state: EngineState, batch: StepBatch, entering: jax.Array | None = None
            ) -> tuple[EngineState, LayerOutput]:
    """Run the model's layers on a batch's tokens, and write the tokens' keys and values to the KV pages of ``state``.

    entering: hidden states ``[R, T, D]`` that the stage before made of the tokens; None in the first stage.
    """
    model = models.target
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    attention = _PagedAttention(models, state, batch, Guard(positions < batch.length[:, None]))
    adapt = adapt_rows(model.config, models.adapters, batch.adapter_slots) if models.adapters else None
    hidden = model.hidden(batch.tokens if entering is None else entering, positions, attention, adapt,
                          tuple(formats is not None for formats in attention.formats))
    attention.guard.check_finite(model.config.num_layers, hidden)
    return attention.state(state), LayerOutput(
        hidden, sum(attention.page_counts, jnp.zeros((len(batch.tokens), 2), jnp.int32)), attention.guard.trips)


def combine_devices(models: Models, batch: StepBatch, output: Output) -> Output:
    """Combine what each device found in its part of the network: pages read are summed, rows that tripped are united.

    A row trips when its numbers are unusable (`Guard`); damaged weights trip every row.
    """
    partition = models.target.partition
    damaged = jnp.where(batch.length > 0, damaged_weights(models.target), 0)
    page_counts = partition.total(output.page_counts) if models.sparsity else output.page_counts
    trips = partition.any_trip(earlier_trip(damaged, output.trips))
    return output._replace(page_counts=page_counts, trips=trips)


class _PagedAttention:
    """Attention that ``Qwen2.hidden`` calls in every layer: writes keys and values to KV pages and attends to them.

    Attributes:
      formats: 8-bit formats of each layer's pages, or None.
      guard: finds unusable numbers.
      page_counts: i32[R, 2] of each layer in a step of the sparse schedule, as in `StepOutput`.
    """

    def __init__(self, models: Models, state: EngineState, batch: StepBatch, guard: Guard) -> None:
        self.formats = models.page_formats or (None,) * models.target.config.num_layers
        self.guard, self.page_counts = guard, []
        self._batch, self._sparsity = batch, models.sparsity
        self._k_pages, self._v_pages, self._summaries = map(list, (state.k_pages, state.v_pages, state.summaries))

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, offset: int = 0) -> jax.Array:
        """Store a layer's keys and values ``[R, T, K, H]``; return the attention of its queries ``[R, T, K, G, H]``.

        offset: index of the first of these tokens in the batch's rows, where a layer takes their tokens in two halves.
        """
        # A second half's keys have to wait for the first one's attention, or the compiler may write them into a copy of
        # all pages. So it writes nothing for rows that have tripped there, whose numbers are not used.
        length = jnp.where(self.guard.trips > 0, 0, self._batch.length) if offset else self._batch.length
        rows = {"page_table": self._batch.page_table, "start": self._batch.start + offset, "length": length}
        k_pages, v_pages = self._write(layer, offset, rows, k, v)
        out = self._attend(layer, q, k_pages, v_pages, rows)
        self.guard.check_finite(layer, out, offset)
        return out

    def state(self, before: EngineState) -> EngineState:
        """Return ``before`` with the KV pages and page summaries that the layers have written since."""
        return before._replace(k_pages=tuple(self._k_pages), v_pages=tuple(self._v_pages),
                               summaries=tuple(self._summaries))

    def _write(self, layer: int, offset: int, rows: dict[str, jax.Array], k, v) -> tuple[Any, Any]:
        """Write a layer's keys and values to its KV pages; return its pages of keys and its pages of values."""
        if self.formats[layer] is None:
            self._k_pages[layer] = write_pages(self._k_pages[layer], k, **rows)
            self._v_pages[layer] = write_pages(self._v_pages[layer], v, **rows)
            return self._k_pages[layer], self._v_pages[layer]
        stored = self._k_pages[layer], self._v_pages[layer]
        k_pages, v_pages = map(EightBitPages, stored, self.formats[layer])
        self.guard.check_storable(layer, [(k_pages, k), (v_pages, v)], offset)
        k_pages, v_pages = write_pages(k_pages, k, **rows), write_pages(v_pages, v, **rows)
        self._k_pages[layer], self._v_pages[layer] = k_pages.stored, v_pages.stored
        return k_pages, v_pages

    def _attend(self, layer: int, q, k_pages, v_pages, rows: dict[str, jax.Array]) -> jax.Array:
        """Return a layer's attention to all pages, or to selected ones; count pages if the schedule is sparse."""
        if self._sparsity is None:
            return paged_attention(q, k_pages, v_pages, **rows)
        visible = visible_pages(q.shape[1], rows["start"], rows["length"]) * q.shape[2]
        if self._sparsity[layer] is None:
            self.page_counts.append(jnp.stack([visible, visible], axis=1))
            return paged_attention(q, k_pages, v_pages, **rows)
        self._summaries[layer] = update_summaries(self._summaries[layer], k_pages, **rows, tokens=q.shape[1])
        out, selection = sparse_attention(q, k_pages, v_pages, self._summaries[layer], **rows,
                                          prompt_length=self._batch.prompt_length, sparsity=self._sparsity[layer])
        self.page_counts.append(jnp.stack([jnp.sum(selection.count, axis=(1, 2)), visible], axis=1))
        return out
