"""Arrays that a compiled step takes and returns, and the state that stays on the device between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from qwen_kernels.attention import (
    PAGE,
    EightBit,
    eight_bit_dtype,
    page_dtype,
)
from qwen_kernels.sparse_attention import Sparsity, new_summaries

from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiled.sampler import (
    Sampled,
    SamplingRows,
)
from qwen_jax.model import Qwen2


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



class Passed(NamedTuple):
    """What a stage of a pipeline hands to the next."""

    hidden: jax.Array  # [R, T, D]
    pages: jax.Array  # i32[R, 2], as in StepOutput, of the layers so far
    trips: jax.Array  # i32[R]



def at_step(batch: StepBatch, tokens, index, slots: int) -> StepBatch:
    """Token ``index`` of a decode step, i32[R]: rows that sample no such token become padding rows."""
    active = index < batch.counts
    return batch._replace(
        tokens=tokens[:, None], start=jnp.where(active, batch.start + index, 0),
        length=jnp.where(active, batch.start + index + 1, 0), slots=jnp.where(active, batch.slots, slots),
        samples=active, sampling=batch.sampling._replace(step=batch.sampling.step + index))
