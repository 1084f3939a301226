"""The functions that get compiled: one prefill or decode step from tokens to sampled tokens. Pure JAX.

Axes: R rows of the bucket, T tokens per row, N pages per row, S slots, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from qwen_kernels.attention import PAGE, page_dtype, paged_attention, write_pages

from qwen_jax.config import ModelConfig
from qwen_jax.engine.adapters import Adapters, adapt_rows
from qwen_jax.engine.sampler import (
    Sampled,
    SamplingRows,
    clear_counts,
    count_output,
    count_prompt,
    sample,
    top_logprobs,
)
from qwen_jax.engine.schedule import Bucket
from qwen_jax.model import Qwen2

SCORED_TOKENS = 64  # prompt positions whose logits [SCORED_TOKENS, V] exist at once
REUSED_TOKENS = 512  # entered into the counts at once
SAMPLED_ROWS = 32  # rows whose logits [SAMPLED_ROWS, V] exist at once


class EngineState(NamedTuple):
    """What lives on the device between steps. Donated to every step."""

    k_pages: tuple[jax.Array, ...]  # L of [P, K, PAGE, H]
    v_pages: tuple[jax.Array, ...]
    token_counts: jax.Array  # i32[S + 1, V]; the last slot belongs to padding rows


class StepBatch(NamedTuple):
    """The rows of one step. Valid rows come first; padding rows have length 0 and slot S."""

    tokens: jax.Array  # i32[R, T]
    start: jax.Array  # i32[R], position of each row's first token
    length: jax.Array  # i32[R], positions known after this step: start + count
    page_table: jax.Array  # i32[R, N]
    slots: jax.Array  # i32[R]
    samples: jax.Array  # bool[R]: the last position yields a token
    prompt_length: jax.Array  # i32[R]; later tokens were generated (before a preemption)
    first: jax.Array  # bool[R]: the first step since admission, whose slot still counts another sequence's tokens
    reused: jax.Array  # i32[R, N * PAGE]: tokens at positions before `start` of a first step, found in the prefix cache
    targets: jax.Array  # i32[R, T]: the token after each position whose log-probability is wanted, else -1
    adapters: jax.Array  # i32[R]: slot of each row's LoRA adapter, 0 for none
    sampling: SamplingRows


class PromptScores(NamedTuple):
    """Log-probabilities of ``StepBatch.targets``; zeros where none was wanted."""

    logprobs: jax.Array  # f32[R, T]
    top_ids: jax.Array  # i32[R, T, 20]
    top_logprobs: jax.Array  # f32[R, T, 20]


class StepOutput(NamedTuple):
    sampled: Sampled
    prompt: PromptScores | None  # None in a decode step


def new_state(config: ModelConfig, num_pages: int, slots: int, dtype) -> EngineState:
    """Empty pages and counts for ``slots`` sequences."""
    shape = (num_pages, config.num_kv_heads, PAGE, config.head_dim)

    def pages():
        return tuple(jnp.zeros(shape, page_dtype(dtype)) for _ in range(config.num_layers))

    return EngineState(pages(), pages(), jnp.zeros((slots + 1, config.vocab_size), jnp.int32))


def run_bucket(model: Qwen2, bucket: Bucket, state: EngineState, batch: StepBatch, vocab_limit: jax.Array,
               adapters: Adapters | None = None) -> tuple[EngineState, StepOutput]:
    """One step of ``bucket``; ``vocab_limit`` (i32 scalar) is the number of ids that exist."""
    if bucket.phase == "decode":
        return _rows(model, bucket.phase, state, batch, vocab_limit, adapters)
    return _micro_batches(model, bucket, state, batch, vocab_limit, adapters)


def _rows(model: Qwen2, phase: str, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """All rows of ``batch`` at once."""
    k_pages, v_pages = list(state.k_pages), list(state.v_pages)
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    valid = positions < batch.length[:, None]

    def attend(layer, q, k, v):
        where = batch.page_table, batch.start, batch.length
        k_pages[layer] = write_pages(k_pages[layer], k, *where)
        v_pages[layer] = write_pages(v_pages[layer], v, *where)
        return paged_attention(q, k_pages[layer], v_pages[layer], *where)

    adapt = adapt_rows(model.config, adapters, batch.adapters) if adapters else None
    hidden = model.hidden(batch.tokens, positions, attend, adapt)
    counts = state.token_counts
    scores = None
    if phase == "prefill":
        generated = positions >= batch.prompt_length[:, None]
        counts = _count_reused(clear_counts(counts, batch.slots, batch.first), batch)
        counts = count_prompt(counts, batch.slots, batch.tokens, valid, generated)
        scores = _score(model, hidden, batch.targets, vocab_limit)
    last = jnp.maximum(batch.length - batch.start - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    sampled = _sample(model, hidden, batch, counts, vocab_limit)
    counts = count_output(counts, batch.slots, sampled.tokens, batch.samples)
    return EngineState(tuple(k_pages), tuple(v_pages), counts), StepOutput(sampled, scores)


def _count_reused(counts, batch: StepBatch):
    """Enters the tokens that no step of this sequence computes: as many turns as the longest reused prefix needs."""
    width = batch.reused.shape[1]
    size = min(REUSED_TOKENS, width)
    most = jnp.max(jnp.where(batch.first, batch.start, 0))

    def body(index, counts):
        begin = jnp.minimum(index * size, width - size)  # the last turn may repeat some: those are left out
        positions = begin + jnp.arange(size)[None]
        tokens = jax.lax.dynamic_slice_in_dim(batch.reused, begin, size, axis=1)
        valid = batch.first[:, None] & (positions < batch.start[:, None]) & (positions >= index * size)
        return count_prompt(counts, batch.slots, tokens, valid, positions >= batch.prompt_length[:, None])

    return jax.lax.fori_loop(0, (most + size - 1) // size, body, counts)


def _sample(model: Qwen2, hidden, batch: StepBatch, counts, vocab_limit) -> Sampled:
    """Head and sampling for ``hidden[R, D]``, at most ``SAMPLED_ROWS`` rows at a time."""

    def some(item):
        hidden, sampling, slots = item
        return sample(model.logits(hidden), sampling, counts, slots, vocab_limit)

    rows = len(hidden)
    items = hidden, batch.sampling, batch.slots
    if rows <= SAMPLED_ROWS or rows % SAMPLED_ROWS:
        return some(items)
    parts = jax.tree.map(lambda x: x.reshape(-1, SAMPLED_ROWS, *x.shape[1:]), items)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), jax.lax.map(some, parts))


def _score(model: Qwen2, hidden, targets, vocab_limit) -> PromptScores:
    """Log-probabilities of ``targets[R, T]``; blocks of positions that want none are skipped at run time."""
    block = min(SCORED_TOKENS, targets.size)
    blocks = hidden.reshape(-1, block, hidden.shape[-1]), targets.reshape(-1, block)

    def one(item):
        hidden, targets = item

        def wanted():
            return top_logprobs(model.logits(hidden), jnp.maximum(targets, 0), vocab_limit)

        def nothing():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(wanted))

        return jax.lax.cond(jnp.any(targets >= 0), wanted, nothing)

    scores = jax.lax.map(one, blocks)
    return PromptScores(*(x.reshape(*targets.shape, *x.shape[2:]) for x in scores))


def _micro_batches(model: Qwen2, bucket: Bucket, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """The rows in groups of ``micro_rows``, so that activations of one group exist at a time (``recompute``).

    Groups of padding rows are not run at all: a prefill step without rows costs nothing.
    """
    size = bucket.micro_rows

    def part(index):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), batch)

    graph, params = nnx.split(model)

    def run(state, index):
        # Tied to the index, weights are not loop-invariant: XLA:CPU would widen all of them to float32 before the loop.
        here, tied = jax.lax.optimization_barrier((params, index))
        return _rows(nnx.merge(graph, here), bucket.phase, state, part(tied), vocab_limit, adapters)

    def body(index, carry):
        state, outputs = carry
        state, output = run(state, index)
        outputs = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, index * size, 0),
                               outputs, output)
        return state, outputs

    shapes = jax.eval_shape(run, state, 0)[1]
    outputs = jax.tree.map(lambda x: jnp.zeros((bucket.rows, *x.shape[1:]), x.dtype), shapes)
    groups = (jnp.sum(batch.length > 0) + size - 1) // size
    return jax.lax.fori_loop(0, groups, body, (state, outputs))
