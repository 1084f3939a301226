"""The processes beside process 0, which run what it tells them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax

from qwen_jax.engine.compiled.state import StepBatch
from qwen_jax.engine.multihost.channel import Follower
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.padded_batch import everything
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_sharding import ShardedLeaves
from qwen_jax.engine.weights.weight_store import VersionedWeights


class FollowerLoop:
    """Another process's engine, which does what process 0 says."""

    REFUSAL = "process 0 alone takes requests and changes the engine: call follow() here"

    def __init__(self, follower: Follower, runner: Runner, weights: VersionedWeights, adapters: AdapterTable) -> None:
        self._follower, self._runner, self._weights, self._adapters = follower, runner, weights, adapters
        self._loaded: ShardedLeaves | None = None
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
