"""Arrays that a compiled step takes and returns, and the state that stays on the device between steps.

Axes: R rows of the bucket, T tokens per row, N pages per row, P pages, K KV heads, H head dim, D model dim,
V vocabulary, L layers, S slots (sequences that run at once), C tokens per row that a step can sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from qwen_kernels.attention import PageFormat, eight_bit_dtype, page_dtype
from qwen_kernels.page import PAGE
from qwen_kernels.sparse_attention import Sparsity, new_summaries

from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiled.lora_rows import Adapters
from qwen_jax.engine.compiled.sampler import Sampled, SamplingRows
from qwen_jax.model import Qwen2


class EngineState(NamedTuple):
    """Arrays that stay on the device between steps: KV pages and token counts. They are donated to every step."""

    k_pages: tuple[jax.Array, ...]  # keys and values, L of [P, K, PAGE, H]
    v_pages: tuple[jax.Array, ...]
    draft_k_pages: tuple[jax.Array, ...]  # of the draft model, by the same page ids; empty without one
    draft_v_pages: tuple[jax.Array, ...]
    summaries: tuple[jax.Array, ...]  # by which sparse attention selects pages, L of [P, K, nodes, 2, H], or empty
    wide_k_pages: tuple[jax.Array, ...]  # pool of the 16-bit fallback; empty without 8-bit steps
    wide_v_pages: tuple[jax.Array, ...]
    token_counts: jax.Array  # i32[S + 1, V], occurrences of tokens in each sequence; the last row is for padding


class StepBatch(NamedTuple):
    """Input arrays of one step, a row per sequence. Valid rows come first; padding rows have length 0 and slot S."""

    tokens: jax.Array  # i32[R, T]
    start: jax.Array  # i32[R], position of each row's first token
    length: jax.Array  # i32[R], number of positions known after this step: start + count
    page_table: jax.Array  # i32[R, N]
    slots: jax.Array  # i32[R], each row's place in the token counts
    samples: jax.Array  # bool[R], whether the last position yields a token
    counts: jax.Array  # i32[R], in decode the maximum of tokens that each row samples
    prompt_length: jax.Array  # i32[R]; later tokens were generated (before a preemption)
    first: jax.Array  # bool[R], first step since admission: the slot still counts another sequence's tokens
    reused: jax.Array  # i32[R, N * PAGE], in a first step the tokens before `start`, from the prefix cache
    targets: jax.Array  # i32[R, T], the token after each position whose log-probability is wanted, else -1
    adapter_slots: jax.Array  # i32[R], place of each row's LoRA adapter in `Adapters`; 0 for none
    allowed: jax.Array  # i32[R, ceil(V / 32)], mask: bit i % 32 of word i // 32 says whether token i may be sampled
    sampling: SamplingRows  # sampling options of each row


class LayerOutput(NamedTuple):
    """Output of all layers of a model, or of the layers of one pipeline stage, which the next stage takes."""

    hidden: jax.Array  # [R, T, D]; after the last layer the final hidden states
    page_counts: jax.Array  # i32[R, 2], as in `StepOutput`, of the layers so far
    trips: jax.Array  # i32[R], as in `StepOutput`, of the layers so far


class PromptScores(NamedTuple):
    """Log-probabilities of prompt tokens (``StepBatch.targets``) and of the 20 most likely; zeros if not wanted."""

    logprobs: jax.Array  # f32[R, T]
    top_ids: jax.Array  # i32[R, T, 20]
    top_logprobs: jax.Array  # f32[R, T, 20]


class StepOutput(NamedTuple):
    """Results of one step, by row: sampled tokens, prompt log-probabilities, pages read, unusable numbers."""

    sampled: Sampled  # sampled tokens and their log-probabilities, with an axis C after R
    counts: jax.Array  # i32[R], how many of the sampled tokens are part of the answer
    prompt: PromptScores | None  # log-probabilities of the prompt; None in a decode step
    page_counts: jax.Array  # i32[R, 2], pages attended to, and visible pages; zeros in steps of full attention
    trips: jax.Array  # i32[R], 0, or 1 + the layer (L: the head) in which a row's numbers first became unusable
    pooled: jax.Array | None = None  # f32[R, 2, D], sum and last of a prefill's final hidden states


class Models(NamedTuple):
    """Networks and constants that a step computes with. An executable takes their arrays as arguments."""

    target: Qwen2  # the model that answers
    vocab_limit: jax.Array  # i32 scalar, number of token ids that exist
    draft: Qwen2 | None = None  # model that guesses tokens, which the target then checks
    sparsity: tuple[Sparsity | None, ...] | None = None  # of each layer; None for full attention
    page_formats: tuple[tuple[PageFormat, PageFormat] | None, ...] = ()  # of each layer's 8-bit keys and values
    adapters: Adapters | None = None  # the LoRA adapters of the target, if the engine has some


def new_state(config: ModelConfig, num_pages: int, slots: int, dtype, draft: ModelConfig | None = None,
              sparse_width: int = 0, kv_cache: Sequence[str | None] = (), wide_pages: int = 0) -> EngineState:
    """Return an engine's state before its first step: empty KV pages, and token counts for ``slots`` sequences.

    Args:
      draft: configuration of the draft model, if there is one.
      sparse_width: pages that one sequence can have, 0 without sparse attention.
      kv_cache: 8-bit type of each layer's pages, or None.
      wide_pages: 16-bit pages for sequences that 8 bits cannot compute, 0 without 8-bit pages.
    """

    def pages(config: ModelConfig | None, num_pages: int, kinds: Sequence[str | None] = ()):
        layers = config.num_layers if config and num_pages else 0
        return tuple(jnp.zeros((num_pages, config.num_kv_heads, PAGE, config.head_dim),
                               eight_bit_dtype(kind) if kind else page_dtype(dtype))
                     for _, kind in zip(range(layers), kinds or (None,) * layers, strict=True))

    k_pages = pages(config, num_pages, kv_cache)
    summaries = tuple(new_summaries(k, sparse_width, page_dtype(dtype)) for k in k_pages) if sparse_width else ()
    return EngineState(
        k_pages=k_pages, v_pages=pages(config, num_pages, kv_cache),
        draft_k_pages=pages(draft, num_pages), draft_v_pages=pages(draft, num_pages), summaries=summaries,
        wide_k_pages=pages(config, wide_pages), wide_v_pages=pages(config, wide_pages),
        token_counts=jnp.zeros((slots + 1, config.vocab_size), jnp.int32))


def at_token(batch: StepBatch, index) -> StepBatch:
    """Return the positions from which a decode step samples token ``index`` of each row.

    Rows that have sampled all their tokens become padding rows.
    """
    active = index < batch.counts
    return batch._replace(start=jnp.where(active, batch.start + index, 0),
                          length=jnp.where(active, batch.start + index + 1, 0))


def decode_batch(batch: StepBatch, tokens, index, padding_slot: int) -> StepBatch:
    """Return the batch from which a decode step samples token ``index`` of each row, after the token ``tokens`` i32[R].
    """
    active = index < batch.counts
    return at_token(batch, index)._replace(
        tokens=tokens[:, None], slots=jnp.where(active, batch.slots, padding_slot), samples=active,
        sampling=batch.sampling._replace(step=batch.sampling.step + index))
