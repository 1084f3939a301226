"""From final hidden states to sampled tokens and log-probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.engine.compiled.sampler import (
    Sampled,
    SamplingRows,
    count_prompt,
    sample,
    top_logprobs,
)
from qwen_jax.engine.compiled.state import PromptScores, StepBatch
from qwen_jax.model import Qwen2

SCORED_TOKENS = 64  # prompt positions whose logits [SCORED_TOKENS, V] exist at once

REUSED_TOKENS = 512  # entered into the counts at once

SAMPLED_ROWS = 32  # rows whose logits [SAMPLED_ROWS, V] exist at once



def count_reused(counts, batch: StepBatch):
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



def sample_rows(model: Qwen2, hidden, sampling: SamplingRows, slots, allowed, counts, vocab_limit) -> Sampled:
    """Head and sampling for ``hidden[R, D]``, at most ``SAMPLED_ROWS`` rows at a time."""

    def some(item):
        hidden, sampling, slots, allowed = item
        return sample(model.logits(hidden), sampling, counts, slots, vocab_limit, allowed)

    rows = len(hidden)
    items = hidden, sampling, slots, allowed
    if rows <= SAMPLED_ROWS or rows % SAMPLED_ROWS:
        return some(items)
    parts = jax.tree.map(lambda x: x.reshape(-1, SAMPLED_ROWS, *x.shape[1:]), items)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), jax.lax.map(some, parts))



def score_prompt(model: Qwen2, hidden, targets, vocab_limit) -> PromptScores:
    """Log-probabilities of ``targets[R, T]``. Positions that want none come last and are skipped at run time."""
    block = min(SCORED_TOKENS, targets.size)
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    order = jnp.argsort(wanted < 0, stable=True)

    def one(places):
        def some():
            return top_logprobs(model.logits(flat[places]), jnp.maximum(wanted[places], 0), vocab_limit)

        def nothing():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(some))

        return jax.lax.cond(jnp.any(wanted[places] >= 0), some, nothing)

    def back(x):  # [blocks, block, ...] in `order`
        x = x.reshape(-1, *x.shape[2:])
        return jnp.zeros_like(x).at[order].set(x, unique_indices=True).reshape(*targets.shape, *x.shape[1:])

    return PromptScores(*map(back, jax.lax.map(one, order.reshape(-1, block))))
