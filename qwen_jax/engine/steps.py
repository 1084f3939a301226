"""The functions that get compiled: one prefill or decode step from tokens to sampled tokens. Pure JAX.

A decode step generates several tokens one after another, or checks drafts: it samples after every draft as if the
drafts before it were the answer, and its tokens count as far as they say the same as the drafts. Each token is drawn
with the random number of its place in the answer, so an answer does not depend on drafts, only its speed does.

Axes: R rows of the bucket, T tokens per row, N pages per row, S slots, V vocabulary, L layers, C tokens per row that a
step can sample.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from qwen_kernels.attention import PAGE, page_dtype, paged_attention, write_pages
from qwen_kernels.sparse_attention import Sparsity, new_summaries, sparse_attention, update_summaries, visible_pages

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
from qwen_jax.engine.schedule import SPARSE, Bucket
from qwen_jax.model import Qwen2

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


class Models(NamedTuple):
    """What a step computes with. An executable takes its arrays as arguments."""

    target: Qwen2
    draft: Qwen2 | None = None  # guesses tokens that the target then checks
    sparsity: tuple[Sparsity | None, ...] | None = None  # of the target's layers; None is full attention


def new_state(config: ModelConfig, num_pages: int, slots: int, dtype, draft: ModelConfig | None = None,
              sparse_width: int = 0) -> EngineState:
    """Empty pages and counts for ``slots`` sequences; ``sparse_width``: pages of a row, 0 without sparse attention."""

    def pages(config: ModelConfig | None):
        shape = config and (num_pages, config.num_kv_heads, PAGE, config.head_dim)
        return tuple(jnp.zeros(shape, page_dtype(dtype)) for _ in range(config.num_layers if config else 0))

    k_pages = pages(config)
    summaries = tuple(new_summaries(k, sparse_width) for k in k_pages) if sparse_width else ()
    return EngineState(k_pages, pages(config), pages(draft), pages(draft), summaries,
                       jnp.zeros((slots + 1, config.vocab_size), jnp.int32))


def run_bucket(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch, vocab_limit: jax.Array,
               adapters: Adapters | None = None) -> tuple[EngineState, StepOutput]:
    """One step of ``bucket``; ``vocab_limit`` (i32 scalar) is the number of ids that exist."""
    if bucket.schedule != SPARSE:
        models = models._replace(sparsity=None)
    if bucket.phase == "prefill":
        return _micro_batches(models, bucket, state, batch, vocab_limit, adapters)
    if bucket.tokens > 1:
        return _check_drafts(models, state, batch, vocab_limit, adapters)
    return _generate(models, bucket, state, batch, vocab_limit, adapters)


def _hidden(models: Models, state: EngineState, batch: StepBatch, adapters):
    """Final hidden states ``[R, T, D]`` of a batch's tokens, whose keys and values are written to their pages, the
    state after it, and the pages attended to (``StepOutput.pages``)."""
    k_pages, v_pages, summaries = list(state.k_pages), list(state.v_pages), list(state.summaries)
    counts = []
    where = batch.page_table, batch.start, batch.length

    def attend(layer, q, k, v):
        k_pages[layer] = write_pages(k_pages[layer], k, *where)
        v_pages[layer] = write_pages(v_pages[layer], v, *where)
        if models.sparsity is None:
            return paged_attention(q, k_pages[layer], v_pages[layer], *where)
        everything = visible_pages(q.shape[1], batch.start, batch.length) * k.shape[2]
        if models.sparsity[layer] is None:
            counts.append(jnp.stack([everything, everything], axis=1))
            return paged_attention(q, k_pages[layer], v_pages[layer], *where)
        summaries[layer] = update_summaries(summaries[layer], k_pages[layer], *where, q.shape[1])
        out, selection = sparse_attention(q, k_pages[layer], v_pages[layer], summaries[layer], *where,
                                          batch.prompt_length, sparsity=models.sparsity[layer])
        counts.append(jnp.stack([jnp.sum(selection.count, axis=(1, 2)), everything], axis=1))
        return out

    model = models.target
    adapt = adapt_rows(model.config, adapters, batch.adapters) if adapters else None
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    hidden = model.hidden(batch.tokens, positions, attend, adapt)
    state = state._replace(k_pages=tuple(k_pages), v_pages=tuple(v_pages), summaries=tuple(summaries))
    return hidden, state, sum(counts, jnp.zeros((len(batch.tokens), 2), jnp.int32))


def _draft_hidden(draft: Qwen2, state: EngineState, batch: StepBatch):
    """As `_hidden`, of the draft model, which attends to everything."""
    own = state._replace(k_pages=state.draft_k_pages, v_pages=state.draft_v_pages, summaries=())
    hidden, own, _ = _hidden(Models(draft), own, batch, None)
    return hidden, state._replace(draft_k_pages=own.k_pages, draft_v_pages=own.v_pages)


def _prefill(models: Models, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """All rows of ``batch`` at once."""
    if models.draft is not None:
        _, state = _draft_hidden(models.draft, state, batch)
    hidden, state, pages = _hidden(models, state, batch, adapters)
    positions = batch.start[:, None] + jnp.arange(batch.tokens.shape[1])
    counts = _count_reused(clear_counts(state.token_counts, batch.slots, batch.first), batch)
    counts = count_prompt(counts, batch.slots, batch.tokens, positions < batch.length[:, None],
                          positions >= batch.prompt_length[:, None])
    scores = _score(models.target, hidden, batch.targets, vocab_limit)
    last = jnp.maximum(batch.length - batch.start - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    sampled = _sample(models.target, hidden, batch.sampling, batch.slots, batch.allowed, counts, vocab_limit)
    counts = count_output(counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), StepOutput(
        jax.tree.map(lambda x: x[:, None], sampled), batch.samples.astype(jnp.int32), scores, pages)


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
        hidden, state, pages = _hidden(models._replace(target=model), state, now, adapters)
        sampled = _sample(model, hidden[:, 0], now.sampling, now.slots, now.allowed, state.token_counts, vocab_limit)
        counts = count_output(state.token_counts, now.slots, sampled.tokens, now.samples)
        return state._replace(token_counts=counts), sampled, pages

    def body(index, carry):
        state, tokens, outputs, pages = carry
        state, sampled, more = one(state, tokens, index)
        outputs = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], index, 1),
                               outputs, sampled)
        return state, sampled.tokens, outputs, pages + more

    _, shapes, pages = jax.eval_shape(one, state, batch.tokens[:, 0], jnp.int32(0))
    outputs = jax.tree.map(lambda x: jnp.zeros((len(x), bucket.steps, *x.shape[1:]), x.dtype), shapes)
    carry = state, batch.tokens[:, 0], outputs, jnp.zeros(pages.shape, pages.dtype)
    if bucket.steps == 1:
        state, _, outputs, pages = body(0, carry)
    else:
        state, _, outputs, pages = jax.lax.fori_loop(0, jnp.max(batch.counts), body, carry)
    return state, StepOutput(outputs, batch.counts, None, pages)


def _check_drafts(models: Models, state: EngineState, batch: StepBatch, vocab_limit, adapters):
    """``batch.tokens``: the last token of each row, and drafts of those after it (-1: the draft model's)."""
    if models.draft is not None:
        state, drawn = _draw_drafts(models.draft, state, batch, vocab_limit)
        batch = batch._replace(tokens=jnp.where(batch.tokens < 0, drawn, batch.tokens))
    hidden, state, pages = _hidden(models, state, batch, adapters)
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
    return state._replace(token_counts=counts), StepOutput(sampled, emitted, None, pages)


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
        now = Models(nnx.merge(graph, here), draft and nnx.merge(draft[0], beside), models.sparsity)
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
