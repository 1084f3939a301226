"""Forward pass of a batch through the layers: hidden states, with keys and values written to their pages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from qwen_kernels.attention import (
    EightBitPages,
    paged_attention,
    write_pages,
)
from qwen_kernels.sparse_attention import sparse_attention, update_summaries, visible_pages

from qwen_jax.engine.compiled.lora_rows import adapt_rows
from qwen_jax.engine.compiled.numeric_guard import Guard, damaged_weights, first_trip
from qwen_jax.engine.compiled.state import EngineState, Models, StepBatch


def combine_devices(models: Models, batch: StepBatch, pages, trips):
    """What each device has counted and found in its part of the network, damaged weights included, put together."""
    partition = models.target.partition
    damaged = jnp.where(batch.length > 0, damaged_weights(models.target), 0)
    return partition.total(pages) if models.sparsity else pages, partition.any_trip(first_trip(damaged, trips))



def forward(models: Models, state: EngineState, batch: StepBatch, adapters, entering: jax.Array | None = None):
    """Final hidden states ``[R, T, D]`` of a batch's tokens, whose keys and values are written to their pages, the
    state after it, the pages attended to (``StepOutput.pages``), and the rows that tripped.

    entering: hidden states that another stage made of the tokens.
    """
    k_pages, v_pages, summaries = list(state.k_pages), list(state.v_pages), list(state.summaries)
    model = models.target
    counts = []
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    guard = Guard(positions < batch.length[:, None])
    pages = models.pages or (None,) * model.config.num_layers

    def write(layer, offset, where, k, v):
        if pages[layer] is None:
            k_pages[layer] = write_pages(k_pages[layer], k, *where)
            v_pages[layer] = write_pages(v_pages[layer], v, *where)
            return k_pages[layer], v_pages[layer]
        forms = zip((k_pages, v_pages), pages[layer], strict=True)
        held = [EightBitPages(stored[layer], form) for stored, form in forms]
        guard.storable(layer, zip(held, (k, v), strict=True), offset)
        held = [write_pages(into, new, *where) for into, new in zip(held, (k, v), strict=True)]
        k_pages[layer], v_pages[layer] = (one.stored for one in held)
        return held

    def attend(layer, q, k, v, offset=0):
        # A second half's keys have to wait for the first one's attention, or the compiler may write them into a copy of
        # all pages. So it writes nothing for rows that have tripped there, whose numbers nobody uses.
        length = jnp.where(guard.trips > 0, 0, batch.length) if offset else batch.length
        where = batch.page_table, batch.start + offset, length
        out = attend_to(layer, where, q, *write(layer, offset, where, k, v))
        guard.finite(layer, out, offset)
        return out

    def attend_to(layer, where, q, k_held, v_held):
        if models.sparsity is None:
            return paged_attention(q, k_held, v_held, *where)
        everything = visible_pages(q.shape[1], *where[1:]) * q.shape[2]
        if models.sparsity[layer] is None:
            counts.append(jnp.stack([everything, everything], axis=1))
            return paged_attention(q, k_held, v_held, *where)
        summaries[layer] = update_summaries(summaries[layer], k_held, *where, q.shape[1])
        out, selection = sparse_attention(q, k_held, v_held, summaries[layer], *where, batch.prompt_length,
                                          sparsity=models.sparsity[layer])
        counts.append(jnp.stack([jnp.sum(selection.count, axis=(1, 2)), everything], axis=1))
        return out

    adapt = adapt_rows(model.config, adapters, batch.adapters) if adapters else None
    entering = batch.tokens if entering is None else entering
    hidden = model.hidden(entering, positions, attend, adapt, tuple(one is not None for one in pages))
    guard.finite(model.config.num_layers, hidden)
    state = state._replace(k_pages=tuple(k_pages), v_pages=tuple(v_pages), summaries=tuple(summaries))
    return hidden, state, sum(counts, jnp.zeros((len(batch.tokens), 2), jnp.int32)), guard.trips
