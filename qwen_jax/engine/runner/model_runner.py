"""Runner of one replica: compiles the programs of its steps, keeps its pages on the devices, and starts steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from qwen_jax.engine.compiled.compile_counter import planned, unplanned_compiles
from qwen_jax.engine.compiled.state import EngineState, StepBatch, StepOutput
from qwen_jax.engine.compiled.steps import run_bucket
from qwen_jax.engine.runner.executable_cache import Executables, Program, attention_tiles
from qwen_jax.engine.runner.kv_transfer import KVTransfer
from qwen_jax.engine.runner.padded_batch import dry_run_batch
from qwen_jax.engine.runner.stage import ShardedWeights, Sizes, Stage
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.errors import UserError

Key = tuple[Bucket, int]  # of a program: its bucket, and the number of the stage that it runs in


class Runner:
    """Runs the steps of one replica of the model, with a compiled program for every bucket (kind and shape of a step).

    Args:
      table: every bucket that a step may have.
      sizes: numbers of pages, slots and the like that the state on the devices has.
      weights: weights of the model.
      shards: indices of the weights' shards that the replica runs on, one of them here and one for each stage in a
        `PipelineRunner`.
      adapters: LoRA adapters.
      draft: weights of the draft model in the same shards, if there is one.
      cache_dir: folder that keeps compiled programs; None keeps none.
      strict: refuse to start a step after a compilation that was not part of a warm-up.

    Attributes:
      stages: devices and state of each shard.
      executables: compiled programs by `Key`.
      prepare_seconds: time to compile or load the programs of each bucket.
      transfers: for each stage, programs that move its pages; empty before `prepare_transfers`.
      warmup_seconds: time of the warm-up.
    """

    def __init__(self, table: tuple[Bucket, ...], sizes: Sizes, *, weights: ShardedWeights, shards: Sequence[int],
                 adapters: AdapterTable, draft: ShardedWeights | None = None, cache_dir: Path | None = None,
                 strict: bool = False) -> None:
        self.table, self.sizes, self.weights, self.adapters = table, sizes, weights.weights, adapters
        self.stages = [Stage(table, sizes, index, weights=weights, adapters=adapters, draft=draft) for index in shards]
        self._strict = strict
        self._vocab_size = self.weights.config.vocab_size
        self.executables = Executables(self._lower, lambda key: self.stages[key[1]].shard.devices,
                                       [stage.identity for stage in self.stages], cache_dir)
        self.prepare_seconds: dict[Bucket, float] = dict.fromkeys(table, 0.0)
        self.transfers: list[KVTransfer] = []
        self.warmup_seconds = 0.0
        self._compiles_at_warmup: int | None = None

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

    def warmup(self, progress: bool) -> None:
        """Compile (or load from disk) and run every program once; nothing compiles afterwards.

        A program that was just compiled runs on one full row. A program from disk has done so before: it runs on
        padding rows only, which a prefill skips.
        """
        began = time.perf_counter()
        with planned():
            for stage in self.stages:
                stage.allocate()
            for bucket in self._prepare_programs(progress, "warm-up"):
                rows = 0 if all(program.from_disk for program in self.programs(bucket)) else 1
                dry_run = dry_run_batch(bucket, self.sizes.slots, self._vocab_size, rows)
                self.finish(self.start(bucket, dry_run, self.weights.current))
        self.warmup_seconds = time.perf_counter() - began
        self._compiles_at_warmup = unplanned_compiles()

    def compile(self, progress: bool) -> None:
        """Compile (or load from disk) every program and run none: for this, weights may be shapes without values."""
        with planned():
            for stage in self.stages:
                stage.prepare()
            list(self._prepare_programs(progress, "compiling"))

    def prepare_transfers(self) -> None:
        """Compile the programs that copy pages from and to other replicas (`kv_transfer`), if they are missing."""
        with planned():
            self.transfers = self.transfers or [KVTransfer(stage) for stage in self.stages]

    def programs(self, bucket: Bucket) -> list[Program]:
        """Return the compiled programs of a bucket, one for each stage."""
        return [self.executables.programs[key] for key in self._keys(bucket)]

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

    def _prepare_programs(self, progress: bool, label: str) -> Iterator[Bucket]:
        """Compile or load the programs of all buckets, and yield each bucket when its programs are ready."""
        keys = [key for bucket in self.table for key in self._keys(bucket)]
        with tqdm(total=len(keys), desc=label, unit="executable", file=sys.stderr, disable=not progress) as bar:
            for (bucket, stage), program in self.executables.prepare(keys):
                self.prepare_seconds[bucket] += program.seconds
                how = "loaded" if program.from_disk else "compiled"
                bar.set_postfix_str(f"{bucket} {how} in {program.seconds:.1f} s")
                if stage == len(self.stages) - 1:
                    yield bucket
                bar.update()

    def _keys(self, bucket: Bucket) -> list[Key]:
        return [(bucket, stage) for stage in range(len(self.stages))]

    def _lower(self, key: Key) -> jax.stages.Lowered:
        bucket, index = key

        def run(models, state, batch):
            return run_bucket(models, bucket, state, batch)

        batch = dry_run_batch(bucket, self.sizes.slots, self._vocab_size)
        with attention_tiles(bucket.chunk_pages):
            return self.stages[index].lower(run, batch)

    # --- steps

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> Any:
        """Start a step on the devices, and return a handle for `done` and `finish` without waiting for the result.

        When the step or its output fails, the state is lost, and with it the runner.
        """
        self._check_strict()
        return self.run((bucket, 0), batch, version)

    def finish(self, started: Any) -> StepOutput:
        """Wait for a started step and return its output on the host."""
        return jax.device_get(started)

    def done(self, started: Any) -> bool:
        """Return whether a started step has ended, so that `finish` would not wait."""
        return all(x.is_ready() for x in jax.tree.leaves(started))

    def run(self, key: Key, batch: StepBatch, version: int, *more: Any) -> Any:
        """Start the program of a bucket and a stage, and return its output, which the devices may still be computing.

        more: further arguments of the program.
        """
        return self.stages[key[1]].run(self.executables.programs[key], batch, version, *more)

    def _check_strict(self) -> None:
        if self._strict and self.compiles_after_warmup:
            raise UserError(f"{self.compiles_after_warmup} compilations since the warm-up, and strict_compiles is on: "
                            "something in this process compiles while requests wait")
