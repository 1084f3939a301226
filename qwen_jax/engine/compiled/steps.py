"""The functions that get compiled: one prefill or decode step from tokens to sampled tokens. Pure JAX.

A decode step generates several tokens one after another, or checks drafts: it samples after every draft as if the
drafts before it were the answer, and its tokens count as far as they agree with the drafts. Each token is drawn with
the random number of its place in the answer, so an answer does not depend on drafts, only its speed does.

Axes are those of `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.engine.compiled.forward import combine_devices, forward
from qwen_jax.engine.compiled.head import count_reused, sample_rows, score_prompt
from qwen_jax.engine.compiled.numeric_guard import earlier_trip
from qwen_jax.engine.compiled.sampler import Sampled, clear_counts, count_output, count_prompt
from qwen_jax.engine.compiled.speculative_steps import accept_drafts, check_drafts, draft_forward
from qwen_jax.engine.compiled.state import EngineState, LayerOutput, Models, StepBatch, StepOutput, decode_batch
from qwen_jax.engine.scheduling.buckets import EIGHT_BIT, Bucket
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.quantization import widened


def run_bucket(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch
               ) -> tuple[EngineState, StepOutput]:
    """Run one prefill or decode step, with the batch shape and the schedule of ``bucket``.

    Beside 8-bit buckets, the others are for rows that 8 bits cannot compute: with 16-bit pages of their own, without
    rounding the inputs of products with 8-bit weights, and without a draft model.
    """
    return _with_own_pages(bucket, models, state, partial(_run, bucket, batch))


def run_stage(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, entering: LayerOutput | None, *,
              token_index: jax.Array, first_layer: int) -> tuple[EngineState, LayerOutput | StepOutput]:
    """Run one micro-batch in one stage of a pipeline; the last stage returns the output of the step.

    Args:
      entering: output of the stage before; None in the first stage.
      token_index: i32, in a decode step the number of tokens that each row has sampled before (an output is of one
        token).
      first_layer: number of this stage's first layer in the whole model.
    """
    if bucket.phase == "decode" and bucket.tokens == 1:
        padding_slot = len(state.token_counts) - 1
        batch = decode_batch(batch, batch.tokens[:, 0], token_index, padding_slot)

    def run(models: Models, state: EngineState):
        state, layers = forward(models, state, batch, entering and entering.hidden)
        layers = combine_devices(models, batch, layers)
        trips = jnp.where(layers.trips > 0, layers.trips + first_layer, 0)
        layers = layers._replace(trips=trips)
        if entering is not None:
            layers = layers._replace(page_counts=entering.page_counts + layers.page_counts,
                                     trips=earlier_trip(entering.trips, layers.trips))
        if models.target.norm is None:
            return state, layers
        if bucket.phase == "prefill":
            return _finish_prefill(models, state, batch, layers)
        if bucket.tokens > 1:
            return accept_drafts(models, state, batch, layers)
        state, sampled = _sample_token(models, state, batch, layers.hidden)
        return state, StepOutput(jax.tree.map(lambda x: x[:, None], sampled), batch.counts, None,
                                 page_counts=layers.page_counts, trips=layers.trips)

    return _with_own_pages(bucket, models, state, run)


def _with_own_pages(bucket: Bucket, models: Models, state: EngineState, run: Callable) -> tuple[EngineState, Any]:
    """Call ``run(models, state)`` with what the bucket uses: 8-bit or 16-bit pages, full or sparse attention."""
    if bucket.schedule != SPARSE:
        models = models._replace(sparsity=None)
    if not state.wide_k_pages or bucket.precision == EIGHT_BIT:
        return run(models, state)
    graph, params = nnx.split(models.target)
    models = models._replace(target=nnx.merge(graph, widened(params)), draft=None, page_formats=())
    after, output = run(models, state._replace(k_pages=state.wide_k_pages, v_pages=state.wide_v_pages))
    return after._replace(k_pages=state.k_pages, v_pages=state.v_pages, wide_k_pages=after.k_pages,
                          wide_v_pages=after.v_pages), output


def _run(bucket: Bucket, batch: StepBatch, models: Models, state: EngineState) -> tuple[EngineState, StepOutput]:
    if bucket.phase == "prefill":
        state, output = _micro_batches(models, bucket, state, batch)
    elif bucket.tokens > 1:
        state, output = check_drafts(models, state, batch)
    else:
        state, output = _generate(models, bucket, state, batch)
    return state, combine_devices(models, batch, output)


# --- prefill


def _micro_batches(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch
                   ) -> tuple[EngineState, StepOutput]:
    """Prefill the rows in groups of ``bucket.micro_rows`` one after another, to bound the memory of activations.

    Groups of padding rows are not run at all: a prefill step without rows costs nothing.
    """
    size = bucket.micro_rows
    (graph, params), draft = nnx.split(models.target), models.draft and nnx.split(models.draft)

    def run_group(state, index):
        # Tied to the index, weights are not loop-invariant: XLA:CPU would widen all of them to float32 before the loop.
        tied_params, tied_draft, index = jax.lax.optimization_barrier((params, draft and draft[1], index))
        tied = models._replace(target=nnx.merge(graph, tied_params), draft=draft and nnx.merge(draft[0], tied_draft))
        group = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), batch)
        return _prefill(tied, state, group)

    def body(index, carry):
        state, outputs = carry
        state, output = run_group(state, index)
        outputs = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, index * size, 0),
                               outputs, output)
        return state, outputs

    shapes = jax.eval_shape(run_group, state, 0)[1]
    outputs = jax.tree.map(lambda x: jnp.zeros((bucket.rows, *x.shape[1:]), x.dtype), shapes)
    groups = (jnp.sum(batch.length > 0) + size - 1) // size
    return jax.lax.fori_loop(0, groups, body, (state, outputs))


def _prefill(models: Models, state: EngineState, batch: StepBatch) -> tuple[EngineState, StepOutput]:
    """Prefill all rows of ``batch`` at once, in the draft model too if there is one."""
    if models.draft is not None:
        state, _ = draft_forward(models, state, batch)
    state, layers = forward(models, state, batch)
    return _finish_prefill(models, state, batch, layers)


def _finish_prefill(models: Models, state: EngineState, batch: StepBatch, layers: LayerOutput
                    ) -> tuple[EngineState, StepOutput]:
    """Complete a prefill: compute log-probabilities of the prompt, sample the next token, pool the hidden states."""
    hidden = layers.hidden
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    counts = count_reused(clear_counts(state.token_counts, batch.slots, batch.first), batch)
    known = positions < batch.length[:, None]
    counts = count_prompt(counts, batch.slots, batch.tokens, known, positions >= batch.prompt_length[:, None])
    scores = score_prompt(models.target, hidden, batch.targets, models.vocab_limit)
    total = jnp.sum(jnp.where(known[:, :, None], hidden, 0), axis=1, dtype=jnp.float32)
    last_index = jnp.maximum(batch.length - batch.start - 1, 0)
    last = jnp.take_along_axis(hidden, last_index[:, None, None], axis=1)[:, 0]
    sampled = sample_rows(models.target, last, batch.sampling, batch.slots, allowed=batch.allowed, counts=counts,
                          vocab_limit=models.vocab_limit)
    counts = count_output(counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), StepOutput(
        sampled=jax.tree.map(lambda x: x[:, None], sampled), counts=batch.samples.astype(jnp.int32), prompt=scores,
        page_counts=layers.page_counts, trips=layers.trips, pooled=jnp.stack([total, last.astype(jnp.float32)], axis=1))


# --- decode


def _generate(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch) -> tuple[EngineState, StepOutput]:
    """Generate tokens one after another, as many for each row as ``batch.counts`` says."""
    graph, params = nnx.split(models.target)

    def generate_token(state, tokens, index):
        tied_params, index = jax.lax.optimization_barrier((params, index))  # as in `_micro_batches`
        token_batch = decode_batch(batch, tokens, index, padding_slot=len(state.token_counts) - 1)
        tied = models._replace(target=nnx.merge(graph, tied_params))
        state, layers = forward(tied, state, token_batch)
        state, sampled = _sample_token(tied, state, token_batch, layers.hidden)
        return state, sampled, layers.page_counts, layers.trips

    def body(index, carry):
        state, tokens, outputs, page_counts, trips = carry
        state, sampled, new_counts, new_trips = generate_token(state, tokens, index)
        outputs = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], index, 1),
                               outputs, sampled)
        return state, sampled.tokens, outputs, page_counts + new_counts, jnp.where(trips == 0, new_trips, trips)

    _, shapes, page_counts, trips = jax.eval_shape(generate_token, state, batch.tokens[:, 0], jnp.int32(0))
    outputs = jax.tree.map(lambda x: jnp.zeros((len(x), bucket.steps, *x.shape[1:]), x.dtype), shapes)
    carry = state, batch.tokens[:, 0], outputs, *(jnp.zeros(x.shape, x.dtype) for x in (page_counts, trips))
    if bucket.steps == 1:
        state, _, outputs, page_counts, trips = body(0, carry)
    else:
        state, _, outputs, page_counts, trips = jax.lax.fori_loop(0, jnp.max(batch.counts), body, carry)
    return state, StepOutput(outputs, batch.counts, None, page_counts=page_counts, trips=trips)


def _sample_token(models: Models, state: EngineState, batch: StepBatch, hidden: jax.Array
                  ) -> tuple[EngineState, Sampled]:
    """Sample the next token of every row from its final hidden state (``[R, 1, D]``), and count it for penalties."""
    sampled = sample_rows(models.target, hidden[:, 0], batch.sampling, batch.slots, allowed=batch.allowed,
                          counts=state.token_counts, vocab_limit=models.vocab_limit)
    counts = count_output(state.token_counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), sampled
