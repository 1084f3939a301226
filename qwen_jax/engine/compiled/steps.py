"""The functions that get compiled: one prefill or decode step from tokens to sampled tokens. Pure JAX.

A decode step generates several tokens one after another, or checks drafts: it samples after every draft as if the
drafts before it were the answer, and its tokens count as far as they say the same as the drafts. Each token is drawn
with the random number of its place in the answer, so an answer does not depend on drafts, only its speed does.

Axes: R rows of the bucket, T tokens per row, N pages per row, S slots, V vocabulary, L layers, C tokens per row that a
step can sample.
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
from qwen_jax.engine.compiled.lora_rows import Adapters
from qwen_jax.engine.compiled.numeric_guard import first_trip
from qwen_jax.engine.compiled.sampler import (
    Sampled,
    clear_counts,
    count_output,
    count_prompt,
)
from qwen_jax.engine.compiled.speculative_steps import after_drafts, check_drafts, draft_forward
from qwen_jax.engine.compiled.state import EngineState, Models, Passed, StepBatch, StepOutput, at_step
from qwen_jax.engine.scheduling.buckets import EIGHT_BIT, Bucket
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.model import Qwen2
from qwen_jax.quantization import widened


def run_bucket(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, vocab_limit: jax.Array,
               adapters: Adapters | None = None) -> tuple[EngineState, StepOutput]:
    """One step of ``bucket``; ``vocab_limit`` (i32 scalar) is the number of ids that exist.

    Where some steps are 8-bit, the others are for what these cannot compute: with pages of their own, without rounding
    what 8-bit weights are multiplied with, and without a draft model.
    """
    return _with_pages_of(bucket, models, state, partial(_run, bucket, batch, vocab_limit, adapters))


def _with_pages_of(bucket: Bucket, models: Models, state: EngineState, run: Callable) -> tuple[EngineState, Any]:
    """``run(models, state)`` with what the bucket computes with and with its pages."""
    if bucket.schedule != SPARSE:
        models = models._replace(sparsity=None)
    if not state.wide_k_pages or bucket.precision == EIGHT_BIT:
        return run(models, state)
    graph, params = nnx.split(models.target)
    models = models._replace(target=nnx.merge(graph, widened(params)), draft=None, pages=())
    after, output = run(models, state._replace(k_pages=state.wide_k_pages, v_pages=state.wide_v_pages))
    return after._replace(k_pages=state.k_pages, v_pages=state.v_pages, wide_k_pages=after.k_pages,
                          wide_v_pages=after.v_pages), output


def _run(bucket: Bucket, batch: StepBatch, vocab_limit, adapters, models: Models, state: EngineState):
    if bucket.phase == "prefill":
        state, output = _micro_batches(models, bucket, state, batch, vocab_limit, adapters)
    elif bucket.tokens > 1:
        state, output = check_drafts(models, state, batch, vocab_limit, adapters)
    else:
        state, output = _generate(models, bucket, state, batch, vocab_limit, adapters)
    pages, trips = combine_devices(models, batch, output.pages, output.trips)
    return state, output._replace(pages=pages, trips=trips)


def run_stage(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, passed: Passed | None,
              turn: jax.Array, first_layer: int, vocab_limit: jax.Array, adapters: Adapters | None = None
              ) -> tuple[EngineState, Passed | StepOutput]:
    """One micro-batch in one stage of a pipeline: what the next one is `Passed`, or the output.

    passed: None in the first stage. turn: i32, in a decode step the tokens that each row has sampled before (an
    output is of one token). first_layer: of this stage in the whole model.
    """
    if bucket.phase == "decode" and bucket.tokens == 1:
        slots = len(state.token_counts) - 1
        batch = at_step(batch, batch.tokens[:, 0], turn, slots)

    def run(models: Models, state: EngineState):
        hidden, state, pages, trips = forward(models, state, batch, adapters, passed and passed.hidden)
        pages, trips = combine_devices(models, batch, pages, trips)
        trips = jnp.where(trips > 0, trips + first_layer, 0)
        if passed is not None:
            pages, trips = passed.pages + pages, first_trip(passed.trips, trips)
        if models.target.norm is None:
            return state, Passed(hidden, pages, trips)
        after = hidden, state, pages, trips, batch, vocab_limit
        if bucket.phase == "prefill":
            return _after_prefill(models, *after)
        if bucket.tokens > 1:
            return after_drafts(models, *after)
        state, sampled = _after_token(models.target, hidden, state, batch, vocab_limit)
        return state, StepOutput(jax.tree.map(lambda x: x[:, None], sampled), batch.counts, None, pages, trips)

    return _with_pages_of(bucket, models, state, run)


def _prefill(models: Models, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """All rows of ``batch`` at once."""
    if models.draft is not None:
        _, state = draft_forward(models.draft, state, batch)
    return _after_prefill(models, *forward(models, state, batch, adapters), batch, vocab_limit)


def _after_prefill(models: Models, hidden, state: EngineState, pages, trips, batch: StepBatch, vocab_limit):
    """From the final hidden states to the output."""
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    counts = count_reused(clear_counts(state.token_counts, batch.slots, batch.first), batch)
    known = positions < batch.length[:, None]
    counts = count_prompt(counts, batch.slots, batch.tokens, known, positions >= batch.prompt_length[:, None])
    scores = score_prompt(models.target, hidden, batch.targets, vocab_limit)
    total = jnp.sum(jnp.where(known[:, :, None], hidden, 0), axis=1, dtype=jnp.float32)
    last = jnp.maximum(batch.length - batch.start - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    sampled = sample_rows(models.target, hidden, batch.sampling, batch.slots, batch.allowed, counts, vocab_limit)
    counts = count_output(counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), StepOutput(
        jax.tree.map(lambda x: x[:, None], sampled), batch.samples.astype(jnp.int32), scores, pages, trips,
        jnp.stack([total, hidden.astype(jnp.float32)], axis=1))


def _generate(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """Tokens one after another, as many for each row as ``batch.counts`` says."""
    graph, params = nnx.split(models.target)

    def one(state, tokens, index):
        here, tied = jax.lax.optimization_barrier((params, index))  # see _micro_batches
        now = at_step(batch, tokens, tied, slots=len(state.token_counts) - 1)
        model = nnx.merge(graph, here)
        hidden, state, pages, trips = forward(models._replace(target=model), state, now, adapters)
        state, sampled = _after_token(model, hidden, state, now, vocab_limit)
        return state, sampled, pages, trips

    def body(index, carry):
        state, tokens, outputs, pages, trips = carry
        state, sampled, more, tripped = one(state, tokens, index)
        outputs = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], index, 1),
                               outputs, sampled)
        return state, sampled.tokens, outputs, pages + more, jnp.where(trips == 0, tripped, trips)

    _, shapes, pages, trips = jax.eval_shape(one, state, batch.tokens[:, 0], jnp.int32(0))
    outputs = jax.tree.map(lambda x: jnp.zeros((len(x), bucket.steps, *x.shape[1:]), x.dtype), shapes)
    carry = state, batch.tokens[:, 0], outputs, *(jnp.zeros(x.shape, x.dtype) for x in (pages, trips))
    if bucket.steps == 1:
        state, _, outputs, pages, trips = body(0, carry)
    else:
        state, _, outputs, pages, trips = jax.lax.fori_loop(0, jnp.max(batch.counts), body, carry)
    return state, StepOutput(outputs, batch.counts, None, pages, trips)


def _after_token(model: Qwen2, hidden, state: EngineState, batch: StepBatch, vocab_limit
                 ) -> tuple[EngineState, Sampled]:
    """From the final hidden states ``[R, 1, D]`` to one token of every row."""
    sampled = sample_rows(model, hidden[:, 0], batch.sampling, batch.slots, batch.allowed, state.token_counts,
                          vocab_limit)
    counts = count_output(state.token_counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), sampled


def _micro_batches(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """The rows in groups of ``micro_rows``, so that activations of one group exist at a time (``recompute``).

    Groups of padding rows are not run at all: a prefill step without rows costs nothing.
    """
    size = bucket.micro_rows

    def part(index):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), batch)

    (graph, params), draft = nnx.split(models.target), models.draft and nnx.split(models.draft)

    def run(state, index):
        # Tied to the index, weights are not loop-invariant: XLA:CPU would widen all of them to float32 before the loop.
        here, beside, tied = jax.lax.optimization_barrier((params, draft and draft[1], index))
        now = models._replace(target=nnx.merge(graph, here), draft=draft and nnx.merge(draft[0], beside))
        return _prefill(now, state, part(tied), vocab_limit, adapters)

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
