"""Runner of one replica: compiles the programs of its steps, keeps its pages on the devices, and starts steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qwen_jax.engine.compiled.compile_counter import planned, unplanned_compiles
from qwen_jax.engine.compiled.state import EngineState, StepBatch, StepOutput
from qwen_jax.engine.compiled.steps import run_bucket
from qwen_jax.engine.runner.executable_cache import Executables, Key, Program, attention_tiles
from qwen_jax.engine.runner.kv_transfer import KVTransfer
from qwen_jax.engine.runner.padded_batch import allow_all_mask, dry_run_batch
from qwen_jax.engine.runner.piece_programs import PiecePrograms
from qwen_jax.engine.runner.piecewise_steps import PiecewiseSteps
from qwen_jax.engine.runner.program_table import ProgramTable
from qwen_jax.engine.runner.stage import ShardedWeights, Sizes, Stage
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.network_part import LAYERS
from qwen_jax.errors import UserError


class Runner:
    """Runs the steps of one replica of the model, with a compiled program for every bucket (kind and shape of a step).

    Args:
      table: every bucket that a step may have.
      sizes: numbers of pages, slots and the like that the state on the devices has.
      weights: weights of the model.
      shards: indices of the weights' shards that the replica runs on, one for each stage.
      adapters: LoRA adapters.
      draft: weights of the draft model in the same shards, if there is one.
      cache_dir: folder that keeps compiled programs; None keeps none.
      strict: refuse to start a step after a compilation that was not part of a warm-up.

    Attributes:
      stages: devices and state of each shard.
      steps: how steps are composed of programs. executables: the programs by key. programs: the same by bucket.
      transfers: for each stage, programs that move its pages; empty before `prepare_transfers`.
      warmup_seconds: time of the warm-up, until the first steps could run.
    """

    def __init__(self, table: tuple[Bucket, ...], sizes: Sizes, *, weights: ShardedWeights, shards: Sequence[int],
                 adapters: AdapterTable, draft: ShardedWeights | None = None, cache_dir: Path | None = None,
                 strict: bool = False) -> None:
        self.table, self.sizes, self.weights, self.adapters = table, sizes, weights.weights, adapters
        self.stages = [Stage(table, sizes, index, weights=weights, adapters=adapters, draft=draft) for index in shards]
        self._strict = strict
        self._vocab_size = self.weights.config.vocab_size
        self.steps = self._composed_steps()
        self.executables = Executables(self.steps.lower, lambda key: self.stages[key[1]].shard.devices,
                                       [stage.identity for stage in self.stages], cache_dir)
        self.programs = ProgramTable(table, self.steps.keys, self.executables)
        self.transfers: list[KVTransfer] = []
        self.warmup_seconds = 0.0
        self._compiles_at_warmup: int | None = None
        self._ran: set[Key] = set()  # programs of the warm-up

    @property
    def ready(self) -> bool:
        """True once the programs and the state are there, so that steps can run."""
        return self._compiles_at_warmup is not None

    @property
    def compiles_after_warmup(self) -> int:
        """Number of XLA compilations in this process since the warm-up, apart from those that engines intend."""
        return unplanned_compiles() - self._compiles_at_warmup if self.ready else 0

    @property
    def state(self) -> EngineState | None:
        """Arrays that steps update on the first stage's devices: pages of keys and values, and token counts."""
        return self.stages[0].state

    @state.setter
    def state(self, state: EngineState) -> None:
        self.stages[0].state = state

    # --- before steps

    def warmup(self, progress: bool, everything: bool = True) -> None:
        """Compile (or load from disk) the programs. Nothing compiles in a request's way afterwards.

        everything: prepare all programs, and run those that were just compiled once on a full row; else prepare only
          the few with which any request can be answered, and run none.
        """
        began = time.perf_counter()
        with planned():
            for stage in self.stages:
                stage.allocate()
            for bucket in self.programs.prepare(None if everything else self.programs.smallest, progress, "warm-up"):
                keys = [key for key in self.steps.keys(bucket) if key not in self._ran] if everything else []
                if not all(self.executables.programs[key].from_disk for key in keys):
                    dry_run = dry_run_batch(bucket, self.sizes.slots, self._vocab_size)
                    self.finish(self.start(bucket, dry_run, self.weights.current))
                self._ran.update(keys)
        self.warmup_seconds = time.perf_counter() - began
        if not self.ready:
            self._compiles_at_warmup = unplanned_compiles()

    def compile(self, progress: bool) -> None:
        """Compile (or load from disk) every program and run none: for this, weights may be shapes without values."""
        with planned():
            for stage in self.stages:
                stage.prepare()
            list(self.programs.prepare(None, progress, "compiling"))

    def prepare_transfers(self) -> None:
        """Compile the programs that copy pages from and to other replicas (`kv_transfer`), if they are missing."""
        with planned():
            self.transfers = self.transfers or [KVTransfer(stage) for stage in self.stages]

    def pause(self) -> None:
        """Free the device memory of the pages and the rest of the state."""
        for stage in self.stages:
            stage.state = None

    def resume(self) -> None:
        """Allocate an empty state (pages, token counts) on the devices, after `compile` or `pause`."""
        for stage in self.stages:
            stage.allocate()
        if not self.ready:
            self._compiles_at_warmup = unplanned_compiles()

    def _composed_steps(self) -> WholeSteps | PiecewiseSteps:
        """Return how steps are composed of programs: models of few layers on one stage run each as a single one."""
        stage, layers = self.stages[0], self.sizes.layers_per_program
        if len(self.stages) == 1 and stage.shard.end - stage.shard.start <= (layers or LAYERS):
            return WholeSteps(stage, self.sizes)
        return PiecewiseSteps(PiecePrograms(self.stages, self.sizes.slots, self.table, layers))

    # --- steps

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> Any:
        """Start a step on the devices, and return a handle for `done` and `finish` without waiting for the result.

        When the step or its output fails, the state is lost, and with it the runner.
        """
        if self._strict and self.compiles_after_warmup:
            raise UserError(f"{self.compiles_after_warmup} compilations since the warm-up, and strict_compiles is on: "
                            "something in this process compiles while requests wait")
        return self.steps.start(self.executables.programs, bucket, batch, version)

    def finish(self, started: Any) -> StepOutput:
        """Wait for a started step and return its output on the host."""
        return self.steps.finish(started)

    def done(self, started: Any) -> bool:
        """Return whether a started step has ended, so that `finish` would not wait."""
        return all(x.is_ready() for x in jax.tree.leaves(self.steps.arrays(started)))


class WholeSteps:
    """Runs each step as one program, whose key is its bucket: the whole model, several tokens of a row, all samples."""

    def __init__(self, stage: Stage, sizes: Sizes) -> None:
        self._stage, self._slots = stage, sizes.slots

    def keys(self, bucket: Bucket) -> list[Key]:
        """Return the keys of the programs that a bucket's steps run."""
        return [(bucket, 0)]

    runs = keys

    def lower(self, key: Key) -> jax.stages.Lowered:
        bucket, _ = key
        stage = self._stage

        def step(state, constants, batch):
            leaves, draft, vocab_limit, adapters = constants
            models = stage.models(stage.whole, leaves, draft=draft, adapters=adapters, vocab_limit=vocab_limit)
            return run_bucket(models, bucket, state, batch)

        constants = stage.shapes_of_weights, stage.shapes_of_draft, stage.vocab_limit, stage.shapes_of_adapters
        with attention_tiles(bucket.chunk_pages):
            return stage.lower(step, stage.shapes, constants, dry_run_batch(bucket, self._slots, stage.vocab_size))

    def start(self, programs: Mapping[Key, Program], bucket: Bucket, batch: StepBatch, version: int) -> StepOutput:
        """Start a step; its output may still be computed. The state on the devices is replaced."""
        stage = self._stage
        if batch.allowed is allow_all_mask(bucket.rows, stage.vocab_size):
            batch = batch._replace(allowed=stage.allow_all(bucket.rows))
        constants = stage.weights(version), stage.draft, stage.vocab_limit, stage.adapters
        stage.state, output = programs[bucket, 0].run(stage.state, constants, batch)
        return output

    def finish(self, started: StepOutput) -> StepOutput:
        """Wait for a started step and return its output on the host."""
        return jax.device_get(started)

    def arrays(self, started: StepOutput) -> Any:
        """Return the arrays that are there once a started step has ended."""
        return started
