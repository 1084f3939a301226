"""Decode steps that check guessed tokens (speculative decoding)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.engine.compiled.forward import forward
from qwen_jax.engine.compiled.head import sample_rows
from qwen_jax.engine.compiled.sampler import count_output, sample
from qwen_jax.engine.compiled.state import EngineState, LayerOutput, Models, StepBatch, StepOutput, decode_batch


def check_drafts(models: Models, state: EngineState, batch: StepBatch) -> tuple[EngineState, StepOutput]:
    """Run a decode step that checks the guessed tokens (drafts) of each row, all in one forward pass.

    ``batch.tokens`` has the last token of each row and the drafts after it, -1 for drafts that the draft model makes.
    """
    if models.draft is not None:
        state, drawn = draw_drafts(models, state, batch)
        batch = batch._replace(tokens=jnp.where(batch.tokens < 0, drawn, batch.tokens))
    state, layers = forward(models, state, batch)
    return accept_drafts(models, state, batch, layers)


def accept_drafts(models: Models, state: EngineState, batch: StepBatch, layers: LayerOutput
                  ) -> tuple[EngineState, StepOutput]:
    """Sample a token at every position, and accept each row's up to the first that differs from its draft."""
    rows, width = batch.tokens.shape
    sampling = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), batch.sampling)
    sampling = sampling._replace(step=sampling.step + jnp.tile(jnp.arange(width), rows))
    sampled = sample_rows(models.target, layers.hidden.reshape(rows * width, -1), sampling,
                          jnp.repeat(batch.slots, width), allowed=jnp.repeat(batch.allowed, width, axis=0),
                          counts=state.token_counts, vocab_limit=models.vocab_limit)
    sampled = jax.tree.map(lambda x: x.reshape(rows, width, *x.shape[1:]), sampled)
    right = sampled.tokens[:, :-1] == batch.tokens[:, 1:]
    right &= jnp.arange(1, width) < batch.counts[:, None]
    emitted = jnp.minimum(1 + jnp.sum(jnp.cumprod(right, axis=1), axis=1), batch.counts)
    counts = state.token_counts
    for index in range(width):
        counts = count_output(counts, batch.slots, sampled.tokens[:, index], index < emitted)
    return state._replace(token_counts=counts), StepOutput(
        sampled, emitted, None, page_counts=layers.page_counts, trips=layers.trips)


def draft_forward(models: Models, state: EngineState, batch: StepBatch) -> tuple[EngineState, jax.Array]:
    """Run the draft model, in full attention, on a batch's tokens; return its final hidden states ``[R, T, D]`` too."""
    own = state._replace(k_pages=state.draft_k_pages, v_pages=state.draft_v_pages, summaries=())
    own, layers = forward(Models(models.draft, models.vocab_limit), own, batch)
    return state._replace(draft_k_pages=own.k_pages, draft_v_pages=own.v_pages), layers.hidden


def draw_drafts(models: Models, state: EngineState, batch: StepBatch) -> tuple[EngineState, jax.Array]:
    """Guess the next tokens of each row with the draft model; return i32[R, T], its last token and the guesses.

    The draft model samples with the same options and random numbers as the target will, so that where the two agree
    about a distribution they mostly draw the same token. It reads its own last guess too, which the next step may need.
    """
    graph, params = nnx.split(models.draft)
    vocab = state.token_counts.shape[1]

    def body(index, carry):
        state, tokens = carry
        # Tied to the index, weights are not loop-invariant: XLA:CPU would widen all of them to float32 before the loop.
        tied_params, index = jax.lax.optimization_barrier((params, index))
        token_batch = decode_batch(batch, jax.lax.dynamic_index_in_dim(tokens, index, 1, keepdims=False), index,
                                   padding_slot=len(state.token_counts) - 1)
        draft = nnx.merge(graph, tied_params)
        state, hidden = draft_forward(models._replace(draft=draft), state, token_batch)
        logits = draft.logits(hidden[:, 0])[:, :vocab]  # vocabularies differ at most in unused ids
        logits = jnp.pad(logits, ((0, 0), (0, vocab - logits.shape[1])), constant_values=-jnp.inf)
        guess = sample(logits, token_batch.sampling, state.token_counts, token_batch.slots, models.vocab_limit).tokens
        following = jnp.minimum(index + 1, tokens.shape[1] - 1)
        guess = jnp.where(following > index, guess, tokens[:, -1])
        return state, jax.lax.dynamic_update_slice_in_dim(tokens, guess[:, None], following, 1)

    return jax.lax.fori_loop(0, jnp.max(batch.counts), body, (state, jnp.maximum(batch.tokens, 0)))
