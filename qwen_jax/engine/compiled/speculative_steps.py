"""Decode steps that check guessed tokens (speculative decoding)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.engine.compiled.forward import forward
from qwen_jax.engine.compiled.head import sample_rows
from qwen_jax.engine.compiled.sampler import (
    count_output,
    sample,
)
from qwen_jax.engine.compiled.state import EngineState, Models, StepBatch, StepOutput, at_step
from qwen_jax.model import Qwen2


def draft_forward(draft: Qwen2, state: EngineState, batch: StepBatch):
    """As `forward`, of the draft model, which attends to everything."""
    own = state._replace(k_pages=state.draft_k_pages, v_pages=state.draft_v_pages, summaries=())
    hidden, own, *_ = forward(Models(draft), own, batch, None)
    return hidden, state._replace(draft_k_pages=own.k_pages, draft_v_pages=own.v_pages)



def check_drafts(models: Models, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """``batch.tokens``: the last token of each row, and drafts of those after it (-1: the draft model's)."""
    if models.draft is not None:
        state, drawn = _draw_drafts(models.draft, state, batch, vocab_limit)
        batch = batch._replace(tokens=jnp.where(batch.tokens < 0, drawn, batch.tokens))
    return after_drafts(models, *forward(models, state, batch, adapters), batch, vocab_limit)



def after_drafts(models: Models, hidden, state: EngineState, pages, trips, batch: StepBatch, vocab_limit):
    """From the final hidden states to the output."""
    rows, width = batch.tokens.shape
    sampling = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), batch.sampling)
    sampling = sampling._replace(step=sampling.step + jnp.tile(jnp.arange(width), rows))
    sampled = sample_rows(models.target, hidden.reshape(rows * width, -1), sampling, jnp.repeat(batch.slots, width),
                      jnp.repeat(batch.allowed, width, axis=0), state.token_counts, vocab_limit)
    sampled = jax.tree.map(lambda x: x.reshape(rows, width, *x.shape[1:]), sampled)
    right = sampled.tokens[:, :-1] == batch.tokens[:, 1:]
    right &= jnp.arange(1, width) < batch.counts[:, None]
    emitted = jnp.minimum(1 + jnp.sum(jnp.cumprod(right, axis=1), axis=1), batch.counts)
    counts = state.token_counts
    for index in range(width):
        counts = count_output(counts, batch.slots, sampled.tokens[:, index], index < emitted)
    return state._replace(token_counts=counts), StepOutput(sampled, emitted, None, pages, trips)



def _draw_drafts(draft: Qwen2, state: EngineState, batch: StepBatch, vocab_limit):
    """Tokens i32[R, T]: the first of each row, and what the draft model says after it.

    It is asked with the same options and random numbers as the target will be, so that where the two agree about a
    distribution they mostly draw the same token. It reads its own last guess too, which the next step may need.
    """
    graph, params = nnx.split(draft)
    vocab = state.token_counts.shape[1]

    def body(index, carry):
        state, tokens = carry
        here, tied = jax.lax.optimization_barrier((params, index))
        now = at_step(batch, jax.lax.dynamic_index_in_dim(tokens, tied, 1, keepdims=False), tied,
                       slots=len(state.token_counts) - 1)
        model = nnx.merge(graph, here)
        hidden, state = draft_forward(model, state, now)
        logits = model.logits(hidden[:, 0])[:, :vocab]  # vocabularies differ at most in unused ids
        logits = jnp.pad(logits, ((0, 0), (0, vocab - logits.shape[1])), constant_values=-jnp.inf)
        guess = sample(logits, now.sampling, state.token_counts, now.slots, vocab_limit).tokens
        following = jnp.minimum(tied + 1, tokens.shape[1] - 1)
        guess = jnp.where(following > tied, guess, tokens[:, -1])
        return state, jax.lax.dynamic_update_slice_in_dim(tokens, guess[:, None], following, 1)

    return jax.lax.fori_loop(0, jnp.max(batch.counts), body, (state, jnp.maximum(batch.tokens, 0)))
