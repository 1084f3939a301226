"""An engine over several processes: what process 0 does on its devices, the others do on theirs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_jax.engine.compiled.state import StepBatch
from qwen_jax.engine.multihost.channel import Follower, Leader
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.padded_batch import everything
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_sharding import ShardedLeaves
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError


def check_same(processes: Leader | Follower, runner: Runner) -> None:
    """UserError in every process when they have not made the same engine."""
    identity = repr((runner.table, runner.sizes, [stage.identity for stage in runner.stages]))
    digests = processes.agree("engine", hashlib.sha256(identity.encode()).hexdigest())
    others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(f"process {', '.join(others)} made another engine than process 0: the model and all arguments "
                        "have to be the same")


class LeaderRunner(Runner):
    """Process 0's: its steps are everyone's."""

    def __init__(self, leader: Leader, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._leader = leader

    def warmup(self, progress: bool) -> None:
        began = time.perf_counter()
        self.compile(progress)  # a step waits for the other processes for less than this may take them
        self._leader.agree("compiled", True)
        super().warmup(progress)
        self._leader.tell("warm")
        self.warmup_seconds = time.perf_counter() - began

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> Any:
        everywhere = batch
        if batch.allowed is everything(bucket.rows, self._vocab_size):  # by far the largest of the arrays
            everywhere = batch._replace(allowed=None)
        self._leader.tell("step", self.table.index(bucket), everywhere, version)
        return super().start(bucket, batch, version)


class LeaderWeights(VersionedWeights):
    """Process 0's: every process loads its own part of the same checkpoint, and versions change everywhere."""

    def __init__(self, leader: Leader, *arguments: Any) -> None:
        super().__init__(*arguments)
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
    """Process 0's: adapters are everyone's."""

    def __init__(self, leader: Leader, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._leader = leader

    def load(self, name: str, folder: str | Path) -> None:
        super().load(name, folder)  # what is refused here, nobody else hears of
        try:
            self._leader.ask("load_adapter", name, str(folder))()
        except UserError:
            self.unload(name)
            raise

    def unload(self, name: str) -> None:
        super().unload(name)
        self._leader.tell("unload_adapter", name)
