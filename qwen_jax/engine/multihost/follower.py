"""Processes other than process 0 of an engine: they run the commands that process 0 sends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax

from qwen_jax.engine.compiled.state import StepBatch
from qwen_jax.engine.multihost.channel import Command, Follower
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.padded_batch import allow_all_mask
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_sharding import ShardedLeaves
from qwen_jax.engine.weights.weight_store import VersionedWeights


class FollowerLoop:
    """Loop that repeats process 0's steps and changes of weights and adapters on this process's devices."""

    REFUSAL = "process 0 alone takes requests and changes the engine: call follow() here"

    def __init__(self, follower: Follower, runner: Runner, weights: VersionedWeights, adapters: AdapterTable) -> None:
        self._follower, self._runner, self._weights, self._adapters = follower, runner, weights, adapters
        self._loaded: ShardedLeaves | None = None
        self._loader = ThreadPoolExecutor(1)  # steps go on while a checkpoint is read
        self._handlers = {
            "step": self._step, "load_weights": self._load_weights, "drop_loaded": self._drop_loaded,
            "add_loaded": self._add_loaded, "make_current": weights.make_current, "forget": weights.forget,
            "drop_unused": weights.drop_unused, "load_adapter": adapters.load, "unload_adapter": self._unload_adapter}

    def warmup(self, progress: bool) -> None:
        """Compile this process's programs, and take part in process 0's warm-up."""
        self._runner.compile(progress)
        self._follower.agree("compiled", True)
        self._runner.resume()
        self.run()

    def run(self) -> None:
        """Run the commands that process 0 sends until its warm-up has ended, or until it closes the connections.

        A failure that process 0 does not wait for ends this process, and with it the others.
        """
        for command in self._follower.commands():
            if command.name == "warm":
                return
            if command.name == "load_weights":
                self._loader.submit(self._answer, command)
            elif command.number is not None:
                self._answer(command)
            else:
                self._handlers[command.name](*command.arguments)

    def _answer(self, command: Command) -> None:
        """Run a command that process 0 waits for, and tell it whether the command succeeded."""
        try:
            self._handlers[command.name](*command.arguments)
        except Exception as error:
            self._follower.answer(command.number, str(error))
        else:
            self._follower.answer(command.number, None)

    def _step(self, index: int, batch: StepBatch, version: int) -> None:
        bucket = self._runner.table[index]
        if batch.allowed is None:
            batch = batch._replace(allowed=allow_all_mask(bucket.rows, self._weights.config.vocab_size))
        # Waiting raises an error of this process's devices here, where it ends the process. Process 0 waits anyway.
        jax.block_until_ready(self._runner.start(bucket, batch, version))

    def _load_weights(self, source: str) -> None:
        self._loaded = self._weights.load(source)

    def _add_loaded(self) -> None:
        self._weights.add(self._loaded)
        self._loaded = None

    def _drop_loaded(self) -> None:
        """Wait for a load of weights that is under way, and drop the loaded weights."""
        self._loader.submit(lambda: None).result()
        self._loaded = None

    def _unload_adapter(self, name: str) -> None:
        if name in self._adapters.names:  # process 0 also unloads an adapter that could not be loaded here
            self._adapters.unload(name)
