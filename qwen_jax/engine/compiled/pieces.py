"""Pieces of a step, each compiled as a program of its own: look-up, blocks of layers, sampling. Pure JAX.

A model of many layers runs its steps as a sequence of these. Blocks of equal layers share one program, which takes
their weights and pages as arguments, and steps with as many rows share that of the sampling. So a program takes as long
to compile in a deep model as in a shallow one, and few are different. Several tokens, micro-batches and drafts are
loops of the host (`runner.piecewise_steps`).

Each function takes what it updates first and returns it first. Axes are those of `state`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.engine.compiled.forward import combine_devices, forward
from qwen_jax.engine.compiled.head import count_prefill, last_hidden, pooled, sample_rows
from qwen_jax.engine.compiled.numeric_guard import Guard, damaged_weights, earlier_trip, in_16_bits
from qwen_jax.engine.compiled.sampler import Sampled, count_output, top_logprobs
from qwen_jax.engine.compiled.speculative_steps import accept_drafts, draft_forward, draw_drafts
from qwen_jax.engine.compiled.state import (
    EngineState,
    LayerOutput,
    Models,
    PromptScores,
    StepBatch,
    StepOutput,
    at_token,
    decode_batch,
)
from qwen_jax.engine.scheduling.schedule_policy import FULL

# The fields of a batch that each piece reads; the others are None.
LAYER_FIELDS = ("tokens", "start", "length", "page_table", "prompt_length", "adapter_slots", "counts")
PREFILL_FIELDS = ("tokens", "start", "length", "slots", "prompt_length", "first", "reused")
SAMPLE_FIELDS = ("tokens", "start", "length", "slots", "samples", "counts", "allowed", "sampling")
DRAFT_FIELDS = ("tokens", "start", "length", "page_table", "slots", "counts", "sampling")
SCORED = 64  # positions of a prompt whose log-probabilities one run of "scores" computes


class Piece(NamedTuple):
    """A piece of a step: the kind and the shapes for which a program is compiled, which several buckets may share."""

    kind: str  # "look-up", "block", "prefilled", "scores", "sample", "check", "draft prefill" or "guesses"
    rows: int
    tokens: int = 1  # per row
    pages: int = 0  # width of the page table
    attention: str = FULL
    wide: bool = False  # whether it is the 16-bit fallback of 8-bit steps
    chunk_pages: int = 0  # pages of keys that full attention reads at a time; 0 leaves it to the kernel
    block: tuple[int, int] = (0, 0)  # first block of layers of its kind, [start, end): others share its program
    samples: int = 0  # in "prefilled", rows of the "sample" that follows

    def __str__(self) -> str:
        name = f"{self.kind}{' sparse' * (self.attention != FULL)} {self.rows}x{self.tokens}"
        return name + f" of {self.block[1] - self.block[0]} layers" * (self.kind == "block") + " 16-bit" * self.wide


class BlockState(NamedTuple):
    """KV pages of a block's layers, and the summaries that sparse attention selects pages by, as in `EngineState`."""

    k_pages: tuple[jax.Array, ...]
    v_pages: tuple[jax.Array, ...]
    summaries: tuple[jax.Array, ...]


class Prefilled(NamedTuple):
    """Results of a prefill before its tokens are sampled, with S rows for as many as the sampling program has."""

    last: jax.Array  # [S, 1, D], each row's last hidden state, before the final norm
    trips: jax.Array  # i32[S], as in `StepOutput`
    hidden: jax.Array  # [R * T, D], final hidden states
    pooled: jax.Array  # f32[R, 2, D], as in `StepOutput`


def look_up(models: Models, tokens: jax.Array, dtype) -> LayerOutput:
    """Return the embeddings of ``tokens[R, T]``, as the first layer takes them."""
    model, rows = models.target, len(tokens)
    return LayerOutput(model.looked_up(tokens, model.partition, dtype), jnp.zeros((rows, 2), jnp.int32),
                       jnp.zeros(rows, jnp.int32))


def run_block(models: Models, piece: Piece, pages: BlockState, batch: StepBatch, entering: LayerOutput, *,
              token_index: jax.Array, first_layer: jax.Array) -> tuple[BlockState, LayerOutput]:
    """Run a block of layers on a batch's hidden states.

    Args:
      entering: output of what came before the block.
      token_index: i32, in a decode step the number of tokens that each row has sampled before.
      first_layer: i32, number of the block's first layer in the whole model.
    """
    models = _in_precision(models, piece)
    if piece.attention == FULL:
        models = models._replace(sparsity=None)
    if piece.tokens == 1:
        batch = at_token(batch, token_index)
    before = _empty_state()._replace(**pages._asdict())
    state, layers = forward(models, before, batch, entering.hidden)
    layers = combine_devices(models, batch, layers)
    trips = jnp.where(layers.trips > 0, layers.trips + first_layer, 0)
    return BlockState(state.k_pages, state.v_pages, state.summaries), LayerOutput(
        layers.hidden, entering.page_counts + layers.page_counts, earlier_trip(entering.trips, trips))


def finish_prefill(models: Models, piece: Piece, token_counts: jax.Array, batch: StepBatch, layers: LayerOutput
                   ) -> tuple[jax.Array, Prefilled]:
    """Count a prefill's tokens for penalties, and pick the hidden states that its results are computed from."""
    hidden, padding = models.target.norm(layers.hidden), piece.samples - piece.rows
    guard = Guard(batch.start[:, None] + jnp.arange(hidden.shape[1]) < batch.length[:, None])
    guard.check_finite(models.target.config.num_layers, hidden)
    last, trips = last_hidden(layers.hidden, batch)[:, None], earlier_trip(layers.trips, guard.trips)
    return count_prefill(token_counts, batch), Prefilled(
        jnp.pad(last, ((0, padding), (0, 0), (0, 0))), jnp.pad(trips, (0, padding)),
        hidden.reshape(-1, hidden.shape[-1]), pooled(hidden, last_hidden(hidden, batch), batch))


def score_positions(models: Models, hidden: jax.Array, positions: jax.Array, targets: jax.Array) -> PromptScores:
    """Return the log-probabilities of ``targets[n]`` after the final hidden states ``hidden[positions]``."""
    return PromptScores(*top_logprobs(models.target.logits(hidden[positions]), targets, models.vocab_limit))


def sample_last(models: Models, piece: Piece, token_counts: jax.Array, batch: StepBatch, hidden: jax.Array, *,
                trips: jax.Array, token_index: jax.Array) -> tuple[jax.Array, tuple[Sampled, jax.Array]]:
    """Sample the next token of every row from its last hidden state ``hidden[R, 1, D]``, and count it for penalties.

    Returns the tokens, with an axis of one token, and the trips as in `StepOutput`. In a prefill, token_index is 0.
    """
    models = _in_precision(models, piece)
    batch = decode_batch(batch, batch.tokens[:, 0], token_index, padding_slot=len(token_counts) - 1)
    hidden, trips = _final(models, batch, hidden, trips)
    sampled = sample_rows(models.target, hidden[:, 0], batch.sampling, batch.slots, allowed=batch.allowed,
                          counts=token_counts, vocab_limit=models.vocab_limit)
    counts = count_output(token_counts, batch.slots, sampled.tokens, batch.samples)
    return counts, (jax.tree.map(lambda x: x[:, None], sampled), trips)


def check_guesses(models: Models, piece: Piece, token_counts: jax.Array, batch: StepBatch, layers: LayerOutput
                  ) -> tuple[jax.Array, StepOutput]:
    """Sample a token at every position, and accept each row's up to the first that differs from its draft."""
    models = _in_precision(models, piece)
    hidden, trips = _final(models, batch, layers.hidden, layers.trips)
    state, output = accept_drafts(models, _empty_state()._replace(token_counts=token_counts), batch,
                                  layers._replace(hidden=hidden, trips=trips))
    return state.token_counts, output


def draft_prefill(models: Models, pages: BlockState, batch: StepBatch) -> BlockState:
    """Run the draft model on a prefill's tokens, to write their keys and values to its pages."""
    state, _ = draft_forward(models, _draft_state(pages), batch)
    return BlockState(state.draft_k_pages, state.draft_v_pages, ())


def guess_tokens(models: Models, pages: BlockState, batch: StepBatch, token_counts: jax.Array
                 ) -> tuple[BlockState, jax.Array]:
    """Guess tokens with the draft model where ``batch.tokens[R, T]`` asks for it; return the tokens, then complete."""
    state, drawn = draw_drafts(models, _draft_state(pages)._replace(token_counts=token_counts), batch)
    return BlockState(state.draft_k_pages, state.draft_v_pages, ()), jnp.where(batch.tokens < 0, drawn, batch.tokens)


def _final(models: Models, batch: StepBatch, hidden: jax.Array, trips: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply the final norm to ``hidden[R, T, D]``, and check it; return it with all trips of the step so far."""
    model = models.target
    normed = model.norm(hidden)
    guard = Guard(batch.start[:, None] + jnp.arange(hidden.shape[1]) < batch.length[:, None])
    guard.check_finite(model.config.num_layers, normed)
    damaged = jnp.where(batch.length > 0, damaged_weights(model), 0)
    trips = earlier_trip(earlier_trip(trips, guard.trips), damaged)
    return normed, model.partition.any_trip(trips)


def _in_precision(models: Models, piece: Piece) -> Models:
    """Return the models as a piece uses them: those of the 16-bit fallback have no 8-bit weights and pages."""
    return models._replace(target=in_16_bits(models.target), draft=None, page_formats=()) if piece.wide else models


def _draft_state(pages: BlockState) -> EngineState:
    return _empty_state()._replace(draft_k_pages=pages.k_pages, draft_v_pages=pages.v_pages)


def _empty_state() -> EngineState:
    """Return a state without arrays, for those that a piece updates to be put in."""
    return EngineState(*[()] * len(EngineState._fields))
