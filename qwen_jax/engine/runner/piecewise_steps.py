"""Steps of a model of many layers or of several stages: sequences of programs that the host starts (`pieces`).

Programs are started one after another without waiting for their results, which stay on the devices: the host is ahead
of these, so that they do not wait for it. A step's rows are split into micro-batches where the bucket says so, and
where there are several stages, on devices of their own: then programs are started in an order in which every stage
always has the next micro-batch queued while it works on another. With s stages and m micro-batches, of which a decode
step has one for every token it generates, a stage is idle for at most (s - 1) / (m + s - 1) of the time, where all take
equally long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from qwen_jax.engine.compiled import pieces
from qwen_jax.engine.compiled.pieces import Prefilled
from qwen_jax.engine.compiled.sampler import MAX_LOGPROBS
from qwen_jax.engine.compiled.state import LayerOutput, PromptScores, StepBatch, StepOutput
from qwen_jax.engine.runner.executable_cache import Key, Program
from qwen_jax.engine.runner.padded_batch import allow_all_mask, pack_rows
from qwen_jax.engine.runner.piece_programs import FIRST_TOKEN, PiecePrograms, select
from qwen_jax.engine.runner.stage import Stage
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import attention_of
from qwen_jax.parallel.placement import put


@dataclass
class MicroBatch:
    """Rows of a step that go through the layers together, and what their programs have returned.

    Attributes:
      host: the rows' part of the step's batch.
      layers: inputs of the blocks, on the devices of each stage. tokens: those of the look-up, on the first stage's.
      last: inputs of the sampling, on the last stage's devices.
      prefilled, scores: results of a prefill; of the scores, the positions and the log-probabilities there.
      page_counts, samples: for each token of a row, pages read, and either what was sampled and the rows' trips, or the
        output of a step with guesses.
    """

    host: StepBatch
    layers: list[StepBatch]
    tokens: jax.Array
    last: StepBatch
    prefilled: Prefilled | None = None
    scores: list[tuple[np.ndarray, PromptScores]] = field(default_factory=list)
    page_counts: list[jax.Array] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)

    @property
    def outputs(self) -> tuple:
        """Arrays that are there once the rows' step has ended."""
        return self.prefilled, [scores for _, scores in self.scores], self.page_counts, self.samples


@dataclass
class StartedStep:
    """A step that has been started, as the micro-batches that it is divided into."""

    bucket: Bucket
    micro_batches: list[MicroBatch]


class PiecewiseSteps:
    """Runs each step as a sequence of programs."""

    def __init__(self, programs: PiecePrograms) -> None:
        self._pieces, self._stages = programs, programs.stages
        self.keys, self.runs, self.lower = programs.keys, programs.runs, programs.lower

    def start(self, programs: Mapping[Key, Program], bucket: Bucket, batch: StepBatch, version: int) -> StartedStep:
        """Start a step without waiting for it: all micro-batches, and all tokens of each row."""
        size = self._pieces.rows(bucket)
        count = max(1, -(-int(np.sum(batch.length > 0)) // size))  # live rows come first; one runs in a dry run
        step = StartedStep(bucket, [self._micro_batch(bucket, batch, slice(index * size, (index + 1) * size))
                                    for index in range(count)])
        run = _Run(self._pieces, programs, bucket, version)
        if bucket.phase == "prefill":
            for micro_batch in step.micro_batches:
                run.prefill(micro_batch)
        elif bucket.tokens > 1:
            for micro_batch in step.micro_batches:
                run.check(micro_batch)
        else:
            for token_index in range(int(max(1, batch.counts.max()))):
                for micro_batch in step.micro_batches:
                    run.generate(micro_batch, np.int32(token_index))
        return step

    def finish(self, started: StartedStep) -> StepOutput:
        """Wait for a started step and return its output on the host, joined from all micro-batches and tokens."""
        bucket = started.bucket
        outputs = [_output(bucket, micro_batch, jax.device_get(micro_batch.outputs))
                   for micro_batch in started.micro_batches]
        if len(outputs) > 1:
            outputs = [jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)]
        return jax.tree.map(lambda x: _padded(x, bucket.rows), outputs[0])

    def arrays(self, started: StartedStep) -> Any:
        """Return the arrays that are there once a started step has ended."""
        return [micro_batch.outputs for micro_batch in started.micro_batches]

    def _micro_batch(self, bucket: Bucket, batch: StepBatch, rows: slice) -> MicroBatch:
        """Return some rows of a step's batch, on the devices."""
        unconstrained = batch.allowed is allow_all_mask(bucket.rows, self._stages[0].vocab_size)
        host = jax.tree.map(lambda x: x[rows], batch._replace(allowed=None) if unconstrained else batch)
        layers = [_put(select(host, pieces.LAYER_FIELDS), stage) for stage in self._stages]
        return MicroBatch(host, layers, _put(host.tokens, self._stages[0]),
                          self._for_last_stage(bucket, host))

    def _for_last_stage(self, bucket: Bucket, host: StepBatch) -> StepBatch:
        """Return the inputs of the sampling on the last stage's devices, with the rows of its program."""
        last, rows = self._stages[-1], self._pieces.sample(bucket).rows
        batch = select(host, pieces.SAMPLE_FIELDS)
        if bucket.phase == "prefill":
            batch = batch._replace(tokens=host.tokens[:, :1], counts=host.samples.astype(np.int32))
            if rows > len(host.length):
                batch = _with_padding_rows(batch, rows, last)
        placed = _put(batch, last)
        return placed._replace(allowed=last.allow_all(rows)) if batch.allowed is None else placed


@dataclass(frozen=True)
class _Run:
    """Starts the programs of one step."""

    pieces: PiecePrograms
    programs: Mapping[Key, Program]
    bucket: Bucket
    version: int

    def prefill(self, micro_batch: MicroBatch) -> None:
        """Start a prefill of the rows: layers, log-probabilities of the prompt where they are wanted, sampling."""
        last = len(self.pieces.stages) - 1
        if self.pieces.has_draft(self.bucket):
            self._run(self.pieces.draft(self.bucket), 0, (self._draft_batch(micro_batch),))
        layers = self._through_layers(micro_batch, micro_batch.tokens, FIRST_TOKEN)
        batch = _put(select(micro_batch.host, pieces.PREFILL_FIELDS), self.pieces.stages[last])
        prefilled = self._run(self.pieces.prefilled(self.bucket), last, (batch, layers))
        targets = micro_batch.host.targets.ravel()
        wanted = np.flatnonzero(targets >= 0)
        size = min(pieces.SCORED, targets.size)
        for start in range(0, len(wanted), size):
            positions = np.zeros(size, np.int32)
            positions[: len(wanted) - start] = wanted[start : start + size]
            inputs = prefilled.hidden, positions, np.maximum(targets[positions], 0)
            scores = self._run(self.pieces.scores(self.bucket), last, inputs)
            micro_batch.scores.append((wanted[start : start + size], scores))
        micro_batch.samples.append(self._run(self.pieces.sample(self.bucket), last, (
            micro_batch.last, prefilled.last, prefilled.trips, FIRST_TOKEN)))
        micro_batch.prefilled = prefilled._replace(hidden=None)

    def generate(self, micro_batch: MicroBatch, token_index: np.int32) -> None:
        """Start the generation of one token of every row, after the tokens that were started before."""
        tokens = micro_batch.tokens
        if micro_batch.samples:
            sampled, _ = micro_batch.samples[-1]
            tokens = _put(sampled.tokens, self.pieces.stages[0])
        layers = self._through_layers(micro_batch, tokens, token_index)
        inputs = micro_batch.last, layers.hidden, layers.trips, token_index
        micro_batch.samples.append(self._run(self.pieces.sample(self.bucket), len(self.pieces.stages) - 1, inputs))

    def check(self, micro_batch: MicroBatch) -> None:
        """Start a check of guessed tokens, of which the draft model makes those that are not there."""
        tokens, last = micro_batch.tokens, len(self.pieces.stages) - 1
        if self.pieces.has_draft(self.bucket):
            stage = self.pieces.stages[0]
            tokens = self._run(self.pieces.draft(self.bucket), 0,
                               (self._draft_batch(micro_batch), stage.state.token_counts))
        layers = self._through_layers(micro_batch, tokens, FIRST_TOKEN)
        batch = micro_batch.last._replace(tokens=_put(tokens, self.pieces.stages[last]))
        micro_batch.samples.append(self._run(self.pieces.sample(self.bucket), last, (batch, layers)))

    def _through_layers(self, micro_batch: MicroBatch, tokens: jax.Array, token_index: np.int32) -> LayerOutput:
        """Start the look-up of tokens and all blocks of layers of all stages."""
        layers = self._run(self.pieces.look_up(self.bucket), 0, (tokens,))
        for index, stage in enumerate(self.pieces.blocks(attention_of(self.bucket.schedule))):
            if index:
                layers = _put(layers, self.pieces.stages[index])
            for block in stage.blocks:
                inputs = micro_batch.layers[index], layers, token_index, stage.first_layer[block]
                layers = self._run(self.pieces.block(self.bucket, index, block), index, inputs, block=block)
        micro_batch.page_counts.append(layers.page_counts)
        return layers

    def _draft_batch(self, micro_batch: MicroBatch) -> StepBatch:
        return _put(select(micro_batch.host, pieces.DRAFT_FIELDS), self.pieces.stages[0])

    def _run(self, piece: pieces.Piece, stage: int, inputs: tuple, **block: Any) -> Any:
        return self.pieces.run(self.programs, (piece, stage), inputs, self.version, **block)


def _put(values: Any, stage: Stage) -> Any:
    """Return arrays, of the host or of other devices, on a stage's devices."""
    to = stage.shard.replicated
    return jax.device_put(values, to) if to.is_fully_addressable else jax.tree.map(lambda x: put(x, to), values)


def _with_padding_rows(batch: StepBatch, rows: int, stage: Stage) -> StepBatch:
    """Append rows of padding to the inputs of a sampling, up to ``rows`` rows."""
    missing = rows - len(batch.length)
    sampling = jax.tree.map(lambda x, padding: np.concatenate([x, padding]), batch.sampling, pack_rows((), missing))
    allowed = batch.allowed
    if allowed is not None:
        allowed = np.concatenate([allowed, allow_all_mask(missing, stage.vocab_size)])
    others = {name: _padded(getattr(batch, name), rows) for name in
              ("tokens", "start", "length", "slots", "samples", "counts")}
    return StepBatch(**batch._asdict() | others | {"sampling": sampling, "allowed": allowed})


def _output(bucket: Bucket, micro_batch: MicroBatch, arrays: tuple) -> StepOutput:
    """Return the output of the rows of a micro-batch. arrays: its ``outputs`` on the host."""
    prefilled, scores, page_counts, samples = arrays
    if bucket.tokens > 1 and bucket.phase == "decode":
        return samples[0]._replace(page_counts=page_counts[0])
    rows = len(micro_batch.host.length)
    sampled = jax.tree.map(lambda *tokens: np.concatenate(tokens, axis=1)[:rows], *(sample for sample, _ in samples))
    trips = samples[0][1][:rows]
    for _, later in samples[1:]:
        trips = np.where(trips == 0, later, trips)
    output = StepOutput(sampled, micro_batch.host.counts, None, page_counts=sum(page_counts), trips=trips)
    if prefilled is None:
        return output
    positions = [positions for positions, _ in micro_batch.scores]
    return output._replace(counts=micro_batch.host.samples.astype(np.int32), pooled=prefilled.pooled,
                           prompt=_prompt_scores(micro_batch.host.targets.shape, positions, scores))


def _prompt_scores(shape: tuple[int, int], positions: list[np.ndarray], scores: list[PromptScores]) -> PromptScores:
    """Return the log-probabilities of a prefill's tokens ``[R, T]`` from those of some positions; zeros elsewhere."""
    size = shape[0] * shape[1]
    whole = PromptScores(np.zeros(size, np.float32), np.zeros((size, MAX_LOGPROBS), np.int32),
                         np.zeros((size, MAX_LOGPROBS), np.float32))
    for at, part in zip(positions, scores, strict=True):
        for array, values in zip(whole, part, strict=True):
            array[at] = values[: len(at)]
    return PromptScores(*(array.reshape(*shape, *array.shape[1:]) for array in whole))


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    """Append zeros to ``x`` up to ``rows`` rows."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)]) if rows > len(x) else x
