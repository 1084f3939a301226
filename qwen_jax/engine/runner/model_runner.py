"""The devices' side of an engine: pages and programs, and what runs one program on them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from qwen_jax.engine.compiled.compile_counter import planned, unplanned_compiles
from qwen_jax.engine.compiled.state import EngineState, StepBatch, StepOutput
from qwen_jax.engine.compiled.steps import run_bucket
from qwen_jax.engine.runner.executable_cache import Executables, Program, attention_tiles
from qwen_jax.engine.runner.padded_batch import dry_run_batch
from qwen_jax.engine.runner.stage import ShardedWeights, Sizes, Stage
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.errors import UserError


class Key(NamedTuple):
    """Of a program."""

    bucket: Bucket
    stage: int


class Runner:
    """Programs for every bucket of a table, for one replica of the model.

    Args:
      held: the weights; draft: those of the model that guesses tokens, in the same parts, if there is one.
      parts: which of their parts it runs on, and with which of the adapters' values: one here, and one for each stage
        in a `Pipeline`.
      cache_dir: where programs are kept; None keeps none.
      strict: refuse to go on after a compilation that was not part of a warm-up.
    """

    def __init__(self, table: tuple[Bucket, ...], sizes: Sizes, held: ShardedWeights, parts: Sequence[int],
                 adapters: AdapterTable, draft: ShardedWeights | None, cache_dir: Path | None,
                 strict: bool = False) -> None:
        self.table, self.sizes, self.weights, self.adapters = table, sizes, held.weights, adapters
        self.stages = [Stage(table, sizes, held, part, adapters, draft) for part in parts]
        self._strict = strict
        self._vocab_size = held.weights.config.vocab_size
        self.executables = Executables(self._lower, lambda key: self.stages[key.stage].part.devices,
                                       [stage.identity for stage in self.stages], cache_dir)
        self.prepare_seconds: dict[Bucket, float] = dict.fromkeys(table, 0.0)
        self.movers: list[Any] = []  # of each stage, what moves its state (see `moving`); empty where nothing will
        self.warmup_seconds = 0.0
        self._compiles_at_warmup: int | None = None

    @property
    def ready(self) -> bool:
        return self._compiles_at_warmup is not None

    @property
    def compiles_after_warmup(self) -> int:
        """XLA compilations in this process since the warm-up that no engine planned."""
        return unplanned_compiles() - self._compiles_at_warmup if self.ready else 0

    @property
    def state(self) -> EngineState | None:
        """Of the first stage."""
        return self.stages[0].state

    @state.setter
    def state(self, state: EngineState) -> None:
        self.stages[0].state = state

    def programs(self, bucket: Bucket) -> list[Program]:
        """One for each stage."""
        return [self.executables[key] for key in self._keys(bucket)]

    def _keys(self, bucket: Bucket) -> list[Key]:
        return [Key(bucket, stage) for stage in range(len(self.stages))]

    def warmup(self, progress: bool) -> None:
        """Compile (or load from disk) and run every program once; nothing compiles afterwards.

        A new program runs on a full row. One from disk has done so before: it runs on none, which a prefill skips.
        """
        began = time.perf_counter()
        with planned():
            for stage in self.stages:
                stage.allocate()
            for bucket in self._prepared(progress, "warm-up"):
                rows = 0 if all(program.from_disk for program in self.programs(bucket)) else 1
                dry = dry_run_batch(bucket, self.sizes.slots, self._vocab_size, rows)
                self.finish(self.start(bucket, dry, self.weights.current))
        self.warmup_seconds = time.perf_counter() - began
        self._compiles_at_warmup = unplanned_compiles()

    def compile(self, progress: bool) -> None:
        """Compile (or load from disk) every program and run none: for this, weights may be shapes without values."""
        with planned():
            for stage in self.stages:
                stage.prepare()
            list(self._prepared(progress, "compiling"))

    def pause(self) -> None:
        """Gives the memory of the state back."""
        for stage in self.stages:
            stage.state = None

    def resume(self) -> None:
        """With an empty state, after `compile` or `pause`."""
        for stage in self.stages:
            stage.allocate()
        if not self.ready:
            self._compiles_at_warmup = unplanned_compiles()

    def _prepared(self, progress: bool, what: str) -> Iterator[Bucket]:
        """Every bucket once its programs are ready."""
        keys = [key for bucket in self.table for key in self._keys(bucket)]
        with tqdm(total=len(keys), desc=what, unit="executable", file=sys.stderr, disable=not progress) as bar:
            for (bucket, stage), program in self.executables.prepare(keys):
                self.prepare_seconds[bucket] += program.seconds
                how = "loaded" if program.from_disk else "compiled"
                bar.set_postfix_str(f"{bucket} {how} in {program.seconds:.1f} s")
                if stage == len(self.stages) - 1:
                    yield bucket
                bar.update()

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> Any:
        """Runs a step, which may still be under way when this returns; `finish` gives its output.

        When it or the output fails, the state is lost, and with it the runner.
        """
        self._check_strict()
        return self.run(Key(bucket, 0), batch, version)

    def finish(self, started: Any) -> StepOutput:
        """The output of what `start` began, on the host."""
        return jax.device_get(started)

    def done(self, started: Any) -> bool:
        """Whether `finish` would not wait."""
        return all(x.is_ready() for x in jax.tree.leaves(started))

    def run(self, key: Key, batch: StepBatch, version: int, *others: Any) -> Any:
        """Runs one program: what it returns beside the state."""
        stage = self.stages[key.stage]
        stage.state, output = self.executables[key].run(*stage.arguments(batch, version, *others))
        return output

    def _check_strict(self) -> None:
        if self._strict and self.compiles_after_warmup:
            raise UserError(f"{self.compiles_after_warmup} compilations since the warm-up, and strict_compiles is on: "
                            "something in this process compiles while requests wait")

    def _lower(self, key: Key) -> jax.stages.Lowered:
        stage = self.stages[key.stage]

        def step(leaves, draft, state, batch, vocab_limit, adapters):
            return run_bucket(stage.models(leaves, draft), key.bucket, state, batch, vocab_limit, adapters)

        batch = dry_run_batch(key.bucket, self.sizes.slots, self._vocab_size)
        with attention_tiles(key.bucket.chunk_pages):
            return stage.lower(step, stage.shapes_of_arguments(batch))
