"""An engine over several processes: what process 0 does on its devices, the others do on theirs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from qwen_jax.engine.compiled.steps import StepBatch
from qwen_jax.engine.multihost.channel import Follower, Leader
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.padded_batch import everything
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_sharding import Version
from qwen_jax.engine.weights.weight_store import Weights
from qwen_jax.errors import UserError


def check_same(processes: Leader | Follower, runner: Runner) -> None:
    """UserError in every process when they have not made the same engine."""
    identity = repr((runner.table, runner.sizes, [stage.identity for stage in runner.stages]))
    digests = processes.agree("engine", hashlib.sha256(identity.encode()).hexdigest())
    others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(f"process {', '.join(others)} made another engine than process 0: the model and all arguments "
                        "have to be the same")


class LeadingRunner(Runner):
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


class LeadingWeights(Weights):
    """Process 0's: every process loads its own part of the same checkpoint, and versions change everywhere."""

    def __init__(self, leader: Leader, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._leader = leader

    def load(self, source: Any) -> Version:
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

    def add(self, leaves: Version) -> int:
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


class LeadingAdapters(AdapterTable):
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


class Following:
    """Another process's engine, which does what process 0 says."""

    REFUSAL = "process 0 alone takes requests and changes the engine: call follow() here"

    def __init__(self, follower: Follower, runner: Runner, weights: Weights, adapters: AdapterTable) -> None:
        self._follower, self._runner, self._weights, self._adapters = follower, runner, weights, adapters
        self._loaded: Version | None = None
        self._loader = ThreadPoolExecutor(1)  # steps go on while a checkpoint is read
        self._do = {"step": self._step, "load_weights": self._load_weights, "drop_loaded": self._drop_loaded,
                    "add_loaded": self._add_loaded, "make_current": weights.make_current, "forget": weights.forget,
                    "drop_unused": weights.drop_unused, "load_adapter": adapters.load,
                    "unload_adapter": self._unload_adapter}

    def warmup(self, progress: bool) -> None:
        """Compiles, and takes part in process 0's warm-up."""
        self._runner.compile(progress)
        self._follower.agree("compiled", True)
        self._runner.resume()
        self.run()

    def run(self) -> None:
        """Until process 0 is warm, or has no more to say. What fails here and is nobody's request ends this process,
        and with it the others."""
        for command, number, arguments in self._follower.commands():
            if command == "warm":
                return
            if command == "load_weights":
                self._loader.submit(self._answer, command, number, arguments)
            elif number is not None:
                self._answer(command, number, arguments)
            else:
                self._do[command](*arguments)

    def _answer(self, command: str, number: int, arguments: tuple) -> None:
        try:
            self._do[command](*arguments)
        except Exception as error:
            self._follower.answer(number, str(error))
        else:
            self._follower.answer(number, None)

    def _step(self, index: int, batch: StepBatch, version: int) -> None:
        bucket = self._runner.table[index]
        if batch.allowed is None:
            batch = batch._replace(allowed=everything(bucket.rows, self._weights.config.vocab_size))
        # Waiting shows an error of this process's devices here, where it ends the process. Process 0 waits anyway.
        jax.block_until_ready(self._runner.start(bucket, batch, version))

    def _load_weights(self, source: str) -> None:
        self._loaded = self._weights.load(source)

    def _add_loaded(self) -> None:
        self._weights.add(self._loaded)
        self._loaded = None

    def _drop_loaded(self) -> None:
        """After the load that is under way, if there is one."""
        self._loader.submit(lambda: None).result()
        self._loaded = None

    def _unload_adapter(self, name: str) -> None:
        if name in self._adapters.names:  # it may be what could not be loaded here
            self._adapters.unload(name)
