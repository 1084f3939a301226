"""Sampling of tokens inside a compiled step, one program for all options. The vocabulary is never sorted.

Order (Hugging Face's): repetition, presence and frequency penalties, bias; temperature; top-k; top-p on what top-k
left; min-p (vLLM takes min-p before top-k and top-p); then one draw. Options that no row of the batch uses are skipped
at run time by ``lax.cond`` or a loop of zero passes; nothing is recompiled. A neighbour's options cannot change a row's
token.

Non-finite logits do not fail: the row gets some id below ``vocab_limit``, and finding the fault is up to the caller.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.engine.api.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS
from qwen_jax.engine.compiled.topk_topp import draw, max_and_argmax, top_k

MAX_BIAS = MAX_LOGIT_BIAS + 20  # a full logit_bias, 16 stop ids and 4 end-of-sequence ids
IN_PROMPT = 1 << 30  # bit 30 of a count; the bits below it say how often the token was generated
GREEDY_BELOW = 1e-5  # temperatures below this are greedy: logits divided by less overflow float32 (vLLM's bound)


class SamplingRows(NamedTuple):
    """Sampling options of the R rows of one step, none of them unset. Meanings are those of ``SamplingParams``."""

    temperature: jax.Array  # f32[R]; 0 is greedy
    top_k: jax.Array  # i32[R]; <= 0 is off
    top_p: jax.Array  # f32[R]; 1 is off
    min_p: jax.Array  # f32[R]; 0 is off
    repetition_penalty: jax.Array  # f32[R]; 1 is off
    presence_penalty: jax.Array  # f32[R]
    frequency_penalty: jax.Array  # f32[R]
    seed: jax.Array  # u32[R]
    step: jax.Array  # i32[R]: index of the token being generated; the random number depends on (seed, step) only
    logprobs: jax.Array  # i32[R]; -1 is none
    bias_ids: jax.Array  # i32[R, MAX_BIAS]; -1 is empty
    bias_values: jax.Array  # f32[R, MAX_BIAS]; -inf bans the id


class Sampled(NamedTuple):
    """Sampled tokens of R rows and their log-probabilities.

    Rows that ask for no log-probabilities have 0 for the token, and ids -1 with -inf for the most likely tokens.
    """

    tokens: jax.Array  # i32[R]
    logprobs: jax.Array  # f32[R], log-softmax of the chosen token's logit as the model gave it
    top_ids: jax.Array  # i32[R, 20], most likely first; -1 where the vocabulary has fewer
    top_logprobs: jax.Array  # f32[R, 20]


def clear_counts(counts, slots, first) -> jax.Array:
    """Set the token counts of rows in their first step to 0: counts i32[S, V], slots i32[R], first bool[R]."""
    return counts.at[jnp.where(first, slots, counts.shape[0])].set(0, mode="drop")


def count_prompt(counts, slots, tokens, valid, is_output) -> jax.Array:
    """Add the tokens of a prefill chunk to the token counts, which penalties are computed from.

    Args:
      counts: i32[S, V].
      slots: i32[R], the row's place in counts.
      tokens: i32[R, T].
      valid: bool[R, T]; other positions are ignored.
      is_output: bool[R, T], marks tokens that were generated before (a request prefilled again after preemption).
    """
    nowhere = counts.shape[0]
    prompt_slot = jnp.where(valid & ~is_output, slots[:, None], nowhere)
    output_slot = jnp.where(valid & is_output, slots[:, None], nowhere)
    # max, because a token that occurs twice must not add its bit twice; there is no scatter-or.
    with_bit = counts[slots[:, None], tokens] | IN_PROMPT
    counts = counts.at[prompt_slot, tokens].max(with_bit, mode="drop")
    return counts.at[output_slot, tokens].add(1, mode="drop")


def count_output(counts, slots, tokens, valid) -> jax.Array:
    """Add one generated token per row to counts i32[S, V]: slots and tokens i32[R], valid bool[R]."""
    return counts.at[jnp.where(valid, slots, counts.shape[0]), tokens].add(1, mode="drop")


def sample(logits, rows: SamplingRows, counts, slots, vocab_limit, allowed=None) -> Sampled:
    """Sample one token per row from its logits, by the options of the row.

    Args:
      logits: f32[R, V].
      rows: options of the rows.
      counts: i32[S, V] token counts; read only if a row has a penalty.
      slots: i32[R], each row's place in counts (any valid place for padding).
      vocab_limit: i32 scalar; ids at or above it do not exist, neither as tokens nor in log-probabilities.
      allowed: masks of allowed tokens, as `apply_mask` takes them; None allows everything.
    """
    logits = jnp.where(jnp.arange(logits.shape[1]) < vocab_limit, logits.astype(jnp.float32), -jnp.inf)
    scores = _penalised(logits, rows, counts, slots)
    if allowed is not None:
        scores = lax.cond(jnp.any(allowed != -1), lambda x: apply_mask(x, allowed), lambda x: x, scores)
    greedy = rows.temperature < GREEDY_BELOW
    top, best = max_and_argmax(scores)
    tokens = lax.cond(
        jnp.all(greedy),
        lambda: best,
        lambda: jnp.where(greedy, best, jnp.minimum(draw(scores, top, rows, ~greedy), vocab_limit - 1)),
    )
    wanted = rows.logprobs >= 0
    size = len(wanted)
    none = (jnp.zeros(size), jnp.full((size, MAX_LOGPROBS), -1, jnp.int32), jnp.full((size, MAX_LOGPROBS), -jnp.inf))

    def logprobs_where_wanted():
        scores = top_logprobs(logits, tokens, vocab_limit)
        return tuple(jnp.where(wanted.reshape(-1, *[1] * (x.ndim - 1)), x, neutral)
                     for x, neutral in zip(scores, none, strict=True))

    return Sampled(tokens, *lax.cond(jnp.any(wanted), logprobs_where_wanted, lambda: none))


def top_logprobs(logits, tokens, vocab_limit) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log-probabilities over ids below vocab_limit, of chosen tokens and of the 20 most likely ones.

    Args: logits f32[R, V]; tokens i32[R], the chosen ones; vocab_limit i32 scalar.
    Returns: log-probabilities of ``tokens`` f32[R]; the most likely ids i32[R, 20] and their log-probabilities
    f32[R, 20].
    """
    logits = jnp.where(jnp.arange(logits.shape[1]) < vocab_limit, logits, -jnp.inf)
    norm = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1) - norm
    size = min(MAX_LOGPROBS, logits.shape[1])
    values, ids = top_k(logits, size)
    pad = ((0, 0), (0, MAX_LOGPROBS - size))
    values = jnp.pad(values - norm, pad, constant_values=-jnp.inf)
    ids = jnp.pad(ids, pad, constant_values=-1)
    return chosen[:, 0], jnp.where(values > -jnp.inf, ids, -1), values


def _penalised(logits, rows, counts, slots):
    """Return logits after penalties and bias. A row without these options is returned bit for bit."""

    def penalties(scores):
        seen = counts[slots]
        generated = (seen & (IN_PROMPT - 1)).astype(jnp.float32)
        factor = rows.repetition_penalty[:, None]
        repeated = jnp.where(scores > 0, scores / factor, scores * factor)
        scores = jnp.where(seen != 0, repeated, scores)
        scores -= rows.frequency_penalty[:, None] * generated
        return scores - rows.presence_penalty[:, None] * (generated > 0)

    def bias(scores):
        ids = jnp.where(rows.bias_ids < 0, scores.shape[1], rows.bias_ids)
        return scores.at[jnp.arange(len(ids))[:, None], ids].add(rows.bias_values, mode="drop")

    penalised = (rows.repetition_penalty != 1) | (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    scores = lax.cond(jnp.any(penalised), penalties, lambda x: x, logits)
    return lax.cond(jnp.any(rows.bias_ids >= 0), bias, lambda x: x, scores)


def apply_mask(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Set scores f32[R, V] to -inf where the mask, int32 or uint32 [R, ceil(V / 32)], has no bit for the token."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=mask.dtype)) & 1
    return jnp.where(bits.reshape(len(mask), -1)[:, : scores.shape[1]] != 0, scores, -jnp.inf)
