"""Runner, weights and adapters of an engine's process 0, which have the other processes do the same as they do."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_jax.engine.compiled.state import StepBatch
from qwen_jax.engine.multihost.channel import Follower, Leader
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.padded_batch import allow_all_mask
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_sharding import ShardedLeaves
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError


def check_same(processes: Leader | Follower, runner: Runner) -> None:
    """Raise UserError, in every process, when the processes' engines differ in model, sizes or programs."""
    identity = repr((runner.table, runner.sizes, [stage.identity for stage in runner.stages]))
    digests = processes.agree("engine", hashlib.sha256(identity.encode()).hexdigest())
    others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(f"process {', '.join(others)} made another engine than process 0: the model and all arguments "
                        "have to be the same")


class LeaderRunner(Runner):
    """Runner of process 0, which sends each step to the other processes so that they run it too."""

    def __init__(self, leader: Leader, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._leader = leader

    def warmup(self, progress: bool, everything: bool = True) -> None:
        began = time.perf_counter()
        self.compile(progress)  # before the first step: compiling may take the others longer than a step may wait
        self._leader.agree("compiled", True)
        super().warmup(progress, everything)
        self._leader.tell("warm")
        self.warmup_seconds = time.perf_counter() - began

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> Any:
        sent = batch
        if batch.allowed is allow_all_mask(bucket.rows, self._vocab_size):  # by far the largest of the arrays
            sent = batch._replace(allowed=None)
        self._leader.tell("step", self.table.index(bucket), sent, version)
        return super().start(bucket, batch, version)


class LeaderWeights(VersionedWeights):
    """Weights of process 0, which have the other processes load, switch and drop the same versions.

    Every process loads its own shard of a checkpoint.
    """

    def __init__(self, leader: Leader, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._leader = leader

    def load(self, source: Any) -> ShardedLeaves:
        if not isinstance(source, str | Path):
            raise UserError("an engine of several processes takes weights from a folder that every one of them can "
                            f"read, not from {type(source).__name__}")
        wait = self._leader.ask("load_weights", str(source))
        try:
            loaded = super().load(source)
        except BaseException:
            self._leader.tell("drop_loaded")
            raise
        try:
            wait()
        except UserError:
            self._leader.tell("drop_loaded")
            raise
        return loaded

    def add(self, leaves: ShardedLeaves) -> int:
        self._leader.tell("add_loaded")
        return super().add(leaves)

    def make_current(self, version: int) -> None:
        self._leader.tell("make_current", version)
        super().make_current(version)

    def forget(self, version: int) -> None:
        self._leader.tell("forget", version)
        super().forget(version)

    def drop_unused(self, used: Iterable[int]) -> None:
        used = sorted(used)
        self._leader.tell("drop_unused", used)
        super().drop_unused(used)


class LeaderAdapters(AdapterTable):
    """Adapters of process 0, which loads and unloads them in the other processes too."""

    def __init__(self, leader: Leader, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._leader = leader

    def load(self, name: str, folder: str | Path) -> None:
        super().load(name, folder)  # first, so that the others are not asked for what is refused here
        try:
            self._leader.ask("load_adapter", name, str(folder))()
        except UserError:
            self.unload(name)
            raise

    def unload(self, name: str) -> None:
        super().unload(name)
        self._leader.tell("unload_adapter", name)
