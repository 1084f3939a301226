"""The functions that get compiled: one prefill or decode step from tokens to sampled tokens. Pure JAX.

A decode step generates several tokens one after another, or checks drafts: it samples after every draft as if the
drafts before it were the answer, and its tokens count as far as they say the same as the drafts. Each token is drawn
with the random number of its place in the answer, so an answer does not depend on drafts, only its speed does.

Axes: R rows of the bucket, T tokens per row, N pages per row, S slots, V vocabulary, L layers, C tokens per row that a
step can sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from qwen_kernels.attention import (
    PAGE,
    EightBit,
    EightBitPages,
    eight_bit_dtype,
    page_dtype,
    paged_attention,
    write_pages,
)
from qwen_kernels.sparse_attention import Sparsity, new_summaries, sparse_attention, update_summaries, visible_pages

from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiled.numeric_guard import Guard, damaged_weights, first_trip
from qwen_jax.engine.compiled.sampler import (
    Sampled,
    SamplingRows,
    clear_counts,
    count_output,
    count_prompt,
    sample,
    top_logprobs,
)
from qwen_jax.engine.scheduling.buckets import EIGHT_BIT, SPARSE, Bucket
from qwen_jax.engine.weights.lora_table import Adapters, adapt_rows
from qwen_jax.model import Qwen2
from qwen_jax.quantization import widened

SCORED_TOKENS = 64  # prompt positions whose logits [SCORED_TOKENS, V] exist at once
REUSED_TOKENS = 512  # entered into the counts at once
SAMPLED_ROWS = 32  # rows whose logits [SAMPLED_ROWS, V] exist at once


class EngineState(NamedTuple):
    """What lives on the device between steps. Donated to every step."""

    k_pages: tuple[jax.Array, ...]  # L of [P, K, PAGE, H]
    v_pages: tuple[jax.Array, ...]
    draft_k_pages: tuple[jax.Array, ...]  # the draft model's, by the same page ids; empty without one
    draft_v_pages: tuple[jax.Array, ...]
    summaries: tuple[jax.Array, ...]  # L of [P, K, nodes, 2, H], what sparse attention selects by; empty without it
    wide_k_pages: tuple[jax.Array, ...]  # a pool of its own, of the model's element type; empty without 8-bit steps
    wide_v_pages: tuple[jax.Array, ...]
    token_counts: jax.Array  # i32[S + 1, V]; the last slot belongs to padding rows


class StepBatch(NamedTuple):
    """The rows of one step. Valid rows come first; padding rows have length 0 and slot S."""

    tokens: jax.Array  # i32[R, T]
    start: jax.Array  # i32[R], position of each row's first token
    length: jax.Array  # i32[R], positions known after this step: start + count
    page_table: jax.Array  # i32[R, N]
    slots: jax.Array  # i32[R]
    samples: jax.Array  # bool[R]: the last position yields a token
    counts: jax.Array  # i32[R]: in decode, tokens that each row samples at most
    prompt_length: jax.Array  # i32[R]; later tokens were generated (before a preemption)
    first: jax.Array  # bool[R]: the first step since admission, whose slot still counts another sequence's tokens
    reused: jax.Array  # i32[R, N * PAGE]: tokens at positions before `start` of a first step, found in the prefix cache
    targets: jax.Array  # i32[R, T]: the token after each position whose log-probability is wanted, else -1
    adapters: jax.Array  # i32[R]: slot of each row's LoRA adapter, 0 for none
    allowed: jax.Array  # i32[R, ceil(V / 32)]: bit i % 32 of word i // 32 says whether token i may be sampled
    sampling: SamplingRows


class PromptScores(NamedTuple):
    """Log-probabilities of ``StepBatch.targets``; zeros where none was wanted."""

    logprobs: jax.Array  # f32[R, T]
    top_ids: jax.Array  # i32[R, T, 20]
    top_logprobs: jax.Array  # f32[R, T, 20]


class StepOutput(NamedTuple):
    sampled: Sampled  # with an axis more: [R, C] and [R, C, 20]
    counts: jax.Array  # i32[R]: how many of the sampled tokens are part of the answer
    prompt: PromptScores | None  # None in a decode step
    pages: jax.Array  # i32[R, 2]: pages attended to, and what full attention would; zeros where it is full attention
    trips: jax.Array  # i32[R]: 0, or 1 + the layer in which this row's numbers first were of no use (L: after the last)
    pooled: jax.Array | None = None  # f32[R, 2, D]: final hidden states of a prefill's tokens, their sum and the last


class Models(NamedTuple):
    """What a step computes with. An executable takes its arrays as arguments."""

    target: Qwen2
    draft: Qwen2 | None = None  # guesses tokens that the target then checks
    sparsity: tuple[Sparsity | None, ...] | None = None  # of the target's layers; None is full attention
    pages: tuple[tuple[EightBit, EightBit] | None, ...] = ()  # how 8-bit pages hold each layer's keys and values


def new_state(config: ModelConfig, num_pages: int, slots: int, dtype, draft: ModelConfig | None = None,
              sparse_width: int = 0, kv_cache: Sequence[str | None] = (), wide_pages: int = 0) -> EngineState:
    """Empty pages and counts for ``slots`` sequences.

    sparse_width: pages of a row, 0 without sparse attention. kv_cache: of each layer, the 8-bit type of its pages, or
    None. wide_pages: of the pool for what 8 bits cannot compute, 0 without one.
    """

    def pages(config: ModelConfig | None, num_pages: int, kinds: Sequence[str | None] = ()):
        layers = config.num_layers if config and num_pages else 0
        return tuple(jnp.zeros((num_pages, config.num_kv_heads, PAGE, config.head_dim),
                               eight_bit_dtype(kind) if kind else page_dtype(dtype))
                     for _, kind in zip(range(layers), kinds or (None,) * layers, strict=True))

    k_pages = pages(config, num_pages, kv_cache)
    summaries = tuple(new_summaries(k, sparse_width, page_dtype(dtype)) for k in k_pages) if sparse_width else ()
    return EngineState(k_pages, pages(config, num_pages, kv_cache), pages(draft, num_pages), pages(draft, num_pages),
                       summaries, pages(config, wide_pages), pages(config, wide_pages),
                       jnp.zeros((slots + 1, config.vocab_size), jnp.int32))


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
        state, output = _check_drafts(models, state, batch, vocab_limit, adapters)
    else:
        state, output = _generate(models, bucket, state, batch, vocab_limit, adapters)
    pages, trips = _known_everywhere(models, batch, output.pages, output.trips)
    return state, output._replace(pages=pages, trips=trips)


class Passed(NamedTuple):
    """What a stage of a pipeline hands to the next."""

    hidden: jax.Array  # [R, T, D]
    pages: jax.Array  # i32[R, 2], as in StepOutput, of the layers so far
    trips: jax.Array  # i32[R]


def run_stage(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, passed: Passed | None,
              turn: jax.Array, first_layer: int, vocab_limit: jax.Array, adapters: Adapters | None = None
              ) -> tuple[EngineState, Passed | StepOutput]:
    """One micro-batch in one stage of a pipeline: what the next one is `Passed`, or the output.

    passed: None in the first stage. turn: i32, in a decode step the tokens that each row has sampled before (an
    output is of one token). first_layer: of this stage in the whole model.
    """
    if bucket.phase == "decode" and bucket.tokens == 1:
        slots = len(state.token_counts) - 1
        batch = _at_step(batch, batch.tokens[:, 0], turn, slots)

    def run(models: Models, state: EngineState):
        hidden, state, pages, trips = _hidden(models, state, batch, adapters, passed and passed.hidden)
        pages, trips = _known_everywhere(models, batch, pages, trips)
        trips = jnp.where(trips > 0, trips + first_layer, 0)
        if passed is not None:
            pages, trips = passed.pages + pages, first_trip(passed.trips, trips)
        if models.target.norm is None:
            return state, Passed(hidden, pages, trips)
        after = hidden, state, pages, trips, batch, vocab_limit
        if bucket.phase == "prefill":
            return _after_prefill(models, *after)
        if bucket.tokens > 1:
            return _after_drafts(models, *after)
        state, sampled = _after_token(models.target, hidden, state, batch, vocab_limit)
        return state, StepOutput(jax.tree.map(lambda x: x[:, None], sampled), batch.counts, None, pages, trips)

    return _with_pages_of(bucket, models, state, run)


def _known_everywhere(models: Models, batch: StepBatch, pages, trips):
    """What each device has counted and found in its part of the network, damaged weights included, put together."""
    partition = models.target.partition
    damaged = jnp.where(batch.length > 0, damaged_weights(models.target), 0)
    return partition.total(pages) if models.sparsity else pages, partition.any_trip(first_trip(damaged, trips))


def _hidden(models: Models, state: EngineState, batch: StepBatch, adapters, entering: jax.Array | None = None):
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


def _draft_hidden(draft: Qwen2, state: EngineState, batch: StepBatch):
    """As `_hidden`, of the draft model, which attends to everything."""
    own = state._replace(k_pages=state.draft_k_pages, v_pages=state.draft_v_pages, summaries=())
    hidden, own, *_ = _hidden(Models(draft), own, batch, None)
    return hidden, state._replace(draft_k_pages=own.k_pages, draft_v_pages=own.v_pages)


def _prefill(models: Models, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """All rows of ``batch`` at once."""
    if models.draft is not None:
        _, state = _draft_hidden(models.draft, state, batch)
    return _after_prefill(models, *_hidden(models, state, batch, adapters), batch, vocab_limit)


def _after_prefill(models: Models, hidden, state: EngineState, pages, trips, batch: StepBatch, vocab_limit):
    """From the final hidden states to the output."""
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    counts = _count_reused(clear_counts(state.token_counts, batch.slots, batch.first), batch)
    known = positions < batch.length[:, None]
    counts = count_prompt(counts, batch.slots, batch.tokens, known, positions >= batch.prompt_length[:, None])
    scores = _score(models.target, hidden, batch.targets, vocab_limit)
    total = jnp.sum(jnp.where(known[:, :, None], hidden, 0), axis=1, dtype=jnp.float32)
    last = jnp.maximum(batch.length - batch.start - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    sampled = _sample(models.target, hidden, batch.sampling, batch.slots, batch.allowed, counts, vocab_limit)
    counts = count_output(counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), StepOutput(
        jax.tree.map(lambda x: x[:, None], sampled), batch.samples.astype(jnp.int32), scores, pages, trips,
        jnp.stack([total, hidden.astype(jnp.float32)], axis=1))


def _at_step(batch: StepBatch, tokens, index, slots: int) -> StepBatch:
    """Token ``index`` of a decode step, i32[R]: rows that sample no such token become padding rows."""
    active = index < batch.counts
    return batch._replace(
        tokens=tokens[:, None], start=jnp.where(active, batch.start + index, 0),
        length=jnp.where(active, batch.start + index + 1, 0), slots=jnp.where(active, batch.slots, slots),
        samples=active, sampling=batch.sampling._replace(step=batch.sampling.step + index))


def _generate(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """Tokens one after another, as many for each row as ``batch.counts`` says."""
    graph, params = nnx.split(models.target)

    def one(state, tokens, index):
        here, tied = jax.lax.optimization_barrier((params, index))  # see _micro_batches
        now = _at_step(batch, tokens, tied, slots=len(state.token_counts) - 1)
        model = nnx.merge(graph, here)
        hidden, state, pages, trips = _hidden(models._replace(target=model), state, now, adapters)
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
    sampled = _sample(model, hidden[:, 0], batch.sampling, batch.slots, batch.allowed, state.token_counts, vocab_limit)
    counts = count_output(state.token_counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), sampled


def _check_drafts(models: Models, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """``batch.tokens``: the last token of each row, and drafts of those after it (-1: the draft model's)."""
    if models.draft is not None:
        state, drawn = _draw_drafts(models.draft, state, batch, vocab_limit)
        batch = batch._replace(tokens=jnp.where(batch.tokens < 0, drawn, batch.tokens))
    return _after_drafts(models, *_hidden(models, state, batch, adapters), batch, vocab_limit)


def _after_drafts(models: Models, hidden, state: EngineState, pages, trips, batch: StepBatch, vocab_limit):
    """From the final hidden states to the output."""
    rows, width = batch.tokens.shape
    sampling = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), batch.sampling)
    sampling = sampling._replace(step=sampling.step + jnp.tile(jnp.arange(width), rows))
    sampled = _sample(models.target, hidden.reshape(rows * width, -1), sampling, jnp.repeat(batch.slots, width),
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
        now = _at_step(batch, jax.lax.dynamic_index_in_dim(tokens, tied, 1, keepdims=False), tied,
                       slots=len(state.token_counts) - 1)
        model = nnx.merge(graph, here)
        hidden, state = _draft_hidden(model, state, now)
        logits = model.logits(hidden[:, 0])[:, :vocab]  # vocabularies differ at most in unused ids
        logits = jnp.pad(logits, ((0, 0), (0, vocab - logits.shape[1])), constant_values=-jnp.inf)
        guess = sample(logits, now.sampling, state.token_counts, now.slots, vocab_limit).tokens
        following = jnp.minimum(tied + 1, tokens.shape[1] - 1)
        guess = jnp.where(following > tied, guess, tokens[:, -1])
        return state, jax.lax.dynamic_update_slice_in_dim(tokens, guess[:, None], following, 1)

    return jax.lax.fori_loop(0, jnp.max(batch.counts), body, (state, jnp.maximum(batch.tokens, 0)))


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


def _sample(model: Qwen2, hidden, sampling: SamplingRows, slots, allowed, counts, vocab_limit) -> Sampled:
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


def _score(model: Qwen2, hidden, targets, vocab_limit) -> PromptScores:
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
