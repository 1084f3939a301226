"""Compilation of the programs that an engine does not have yet, while it serves with those that it has.

On CPUs a process of low priority compiles them, so that requests keep the cores and the compiler's crash does not end
the engine. It sends each program through a pipe: nothing depends on a folder that can be written. Elsewhere a thread
does it, because a second process has no devices to compile for.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import jax

from qwen_jax.engine.config import memory
from qwen_jax.engine.config.resolve import ResolvedConfig
from qwen_jax.engine.runner.executable_cache import Key, environment
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.parallel.plan import ParallelPlan

log = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "qwen_jax.engine.core.compile_process")
START_AFTER_SECONDS = 2  # a command that has ended by then needs no other programs
FRUITLESS_STARTS = 3  # of the process, after which the engine goes on with the programs that it has
JAX_OPTIONS = ("jax_platforms", "jax_default_matmul_precision", "jax_enable_x64", "jax_num_cpu_devices")


class CompileJob(NamedTuple):
    """Job of a compiling process: the programs to compile, and the engine that they are for.

    Attributes:
      pages: number of pages of each replica, and of the 16-bit fallback.
      adapters: number of LoRA adapters and their largest rank.
      environment: what programs depend on in the process that will run them.
      jax_options: values of `JAX_OPTIONS` there.
      keys: for each program, the number of its replica and its key.
    """

    config: ResolvedConfig
    plan: ParallelPlan
    pages: tuple[int, int]
    adapters: tuple[int, int]
    environment: dict[str, Any]
    jax_options: dict[str, Any]
    keys: list[tuple[int, Key]]


class CompiledProgram(NamedTuple):
    """A program that the compiling process sends: its place in the job, its serialised form, and its seconds."""

    index: int
    payload: bytes
    seconds: float


class BackgroundCompiler:
    """Compiles the programs that runners miss, on a thread that lives until all are there.

    Args:
      runners: those of all replicas. job: what a compiling process is to do; its keys are filled in here.
    """

    def __init__(self, runners: Sequence[Runner], job: CompileJob) -> None:
        self._runners, self._job = list(runners), job
        self._process: subprocess.Popen | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the compiling process, and compile nothing more."""
        self._stopped.set()
        if self._process:
            self._process.kill()

    def join(self) -> None:
        """Wait until all programs are there, or cannot be had."""
        self._thread.join()

    def _work(self) -> None:
        try:
            for runner in self._runners:
                runner.programs.load_missing(self._stopped)
            if self._stopped.wait(START_AFTER_SECONDS):
                return
            if memory.platform() == "cpu":
                self._compile_in_process()
            else:
                self._compile_here()
        except BaseException:
            if not self._stopped.is_set():
                log.exception("the background compilation ended; the engine goes on with the programs that it has")

    def _missing(self) -> list[tuple[int, Key]]:
        return [(index, key) for index, runner in enumerate(self._runners) for key in runner.programs.missing]

    def _compile_here(self) -> None:
        for index, key in self._missing():
            if self._stopped.is_set():
                return
            self._runners[index].programs.prepare_key(key)

    def _compile_in_process(self) -> None:
        """Have a process compile what is missing, and start another if it ends before that, a few times."""
        fruitless, missing = 0, self._missing()
        while missing and not self._stopped.is_set():
            error = self._run_process(missing)
            if self._stopped.is_set():
                return
            before, missing = len(missing), self._missing()
            if not missing:
                return
            fruitless = fruitless + 1 if len(missing) == before else 0
            again = fruitless < FRUITLESS_STARTS
            log.warning("the process that compiles in the background ended (%s) with %d programs to come: %s", error,
                        len(missing), "starting another" if again else "the engine goes on without these")
            if not again:
                return
            missing = missing[1:] + missing[:1]  # where one program ends the compiler, the others come first

    def _run_process(self, missing: list[tuple[int, Key]]) -> str:
        """Run a process that compiles these programs, and take them over as they come; return how it ended."""
        self._process = process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._stopped.is_set():
            process.kill()
        error = None
        try:
            pickle.dump(self._job._replace(keys=missing), process.stdin)
            process.stdin.flush()
            while (program := _read(process.stdout)) is not None:
                if isinstance(program, str):
                    error = program
                    continue
                index, key = missing[program.index]
                self._runners[index].programs.take(key, program.payload, program.seconds)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            pass
        finally:
            with contextlib.suppress(BrokenPipeError):  # where it ended before it had read the job
                process.stdin.close()  # on which the process ends
            code = process.wait()
            process.stdout.close()
        return error or f"exit code {code}"


def compile_job(config: ResolvedConfig, plan: ParallelPlan, pages: tuple[int, int], adapters: tuple[int, int]
                ) -> CompileJob:
    """Return the job of a compiling process for an engine of this process, without keys."""
    options = {name: getattr(jax.config, name) for name in JAX_OPTIONS if hasattr(jax.config, name)}
    return CompileJob(config, plan, pages, adapters, environment=environment(), jax_options=options, keys=[])


def _read(stream: BinaryIO) -> CompiledProgram | str | None:
    """Read what a compiling process sends next: a program, or a sentence that says why it ends; None at the end."""
    try:
        return pickle.load(stream)
    except EOFError:
        return None
