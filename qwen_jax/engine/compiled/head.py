"""Language model head inside a step: samples tokens from hidden states, and computes prompts' log-probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.engine.compiled.sampler import (
    Sampled,
    SamplingRows,
    clear_counts,
    count_prompt,
    sample,
    top_logprobs,
)
from qwen_jax.engine.compiled.state import PromptScores, StepBatch
from qwen_jax.model import Qwen2

SCORED_TOKENS = 64  # prompt positions whose logits [SCORED_TOKENS, V] exist at once
REUSED_TOKENS = 512  # reused tokens of each row that are added to the counts at once
SAMPLED_ROWS = 32  # rows whose logits [SAMPLED_ROWS, V] exist at once


def sample_rows(model: Qwen2, hidden, sampling: SamplingRows, slots, *, allowed, counts, vocab_limit) -> Sampled:
    """Compute logits of ``hidden[R, D]`` and sample a token for each row, at most ``SAMPLED_ROWS`` rows at a time."""

    def sample_group(group):
        hidden, sampling, slots, allowed = group
        return sample(model.logits(hidden), sampling, counts, slots, vocab_limit=vocab_limit, allowed=allowed)

    rows = len(hidden)
    inputs = hidden, sampling, slots, allowed
    if rows <= SAMPLED_ROWS or rows % SAMPLED_ROWS:
        return sample_group(inputs)
    groups = jax.tree.map(lambda x: x.reshape(-1, SAMPLED_ROWS, *x.shape[1:]), inputs)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), jax.lax.map(sample_group, groups))


def score_prompt(model: Qwen2, hidden, targets, vocab_limit) -> PromptScores:
    """Return the log-probabilities of prompt tokens ``targets[R, T]`` after final hidden states ``hidden[R, T, D]``.

    Positions without a target (-1) are put last, and blocks of them are skipped at run time.
    """
    block_size = min(SCORED_TOKENS, targets.size)
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    order = jnp.argsort(flat_targets < 0, stable=True)

    def score_block(positions):
        def scores():
            return top_logprobs(model.logits(flat_hidden[positions]), jnp.maximum(flat_targets[positions], 0),
                                vocab_limit)

        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(scores))

        return jax.lax.cond(jnp.any(flat_targets[positions] >= 0), scores, zeros)

    def in_place(x):
        """Undo the reordering by ``order``: move values ``[blocks, block_size, ...]`` to their targets' places."""
        x = x.reshape(-1, *x.shape[2:])
        return jnp.zeros_like(x).at[order].set(x, unique_indices=True).reshape(*targets.shape, *x.shape[1:])

    return PromptScores(*map(in_place, jax.lax.map(score_block, order.reshape(-1, block_size))))


def count_prefill(counts, batch: StepBatch):
    """Add a prefill's tokens to the token counts, and those that rows in their first step reuse."""
    counts = count_reused(clear_counts(counts, batch.slots, batch.first), batch)
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    return count_prompt(counts, batch.slots, batch.tokens, positions < batch.length[:, None],
                        positions >= batch.prompt_length[:, None])


def last_hidden(hidden, batch: StepBatch):
    """Return the hidden state ``[R, D]`` of each row's last token in a prefill, out of ``hidden[R, T, D]``."""
    last_index = jnp.maximum(batch.length - batch.start - 1, 0)
    return jnp.take_along_axis(hidden, last_index[:, None, None], axis=1)[:, 0]


def pooled(hidden, last, batch: StepBatch):
    """Return the sum and the last of each row's hidden states in a prefill, f32[R, 2, D]; ``last[R, D]`` are those."""
    known = batch.start[:, None] + jnp.arange(hidden.shape[1]) < batch.length[:, None]
    total = jnp.sum(jnp.where(known[:, :, None], hidden, 0), axis=1, dtype=jnp.float32)
    return jnp.stack([total, last.astype(jnp.float32)], axis=1)


def count_reused(counts, batch: StepBatch):
    """Add the tokens that rows in their first step reuse from the prefix cache to the token counts, for penalties.

    ``REUSED_TOKENS`` of every row are added at a time, until the row with the most is done.
    """
    width = batch.reused.shape[1]
    size = min(REUSED_TOKENS, width)
    longest = jnp.max(jnp.where(batch.first, batch.start, 0))

    def body(index, counts):
        begin = jnp.minimum(index * size, width - size)  # the last turn may repeat some: those are left out
        positions = begin + jnp.arange(size)[None]
        tokens = jax.lax.dynamic_slice_in_dim(batch.reused, begin, size, axis=1)
        valid = batch.first[:, None] & (positions < batch.start[:, None]) & (positions >= index * size)
        return count_prompt(counts, batch.slots, tokens, valid, positions >= batch.prompt_length[:, None])

    return jax.lax.fori_loop(0, (longest + size - 1) // size, body, counts)
