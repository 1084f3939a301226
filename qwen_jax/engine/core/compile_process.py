"""Process that compiles programs for an engine in another process, which it gets its job from and sends them to."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

NICENESS = 5  # leaves the serving process two thirds of a core that both want
ENDED = 1  # exit code where the engine's process has ended


def main() -> None:
    """Compile the programs of the job on stdin, and write them to stdout; end when the other process does."""
    results, sys.stdout = sys.stdout.buffer, sys.stderr  # what libraries print must not get between the programs
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_exit_at_end_of, args=(sys.stdin.buffer,), daemon=True).start()
    import jax

    for name, value in job.jax_options.items():
        jax.config.update(name, value)
    from qwen_jax.engine.core.replica import Deployment
    from qwen_jax.engine.runner.executable_cache import environment, serialized

    differing = sorted(name for name, value in environment().items() if job.environment.get(name) != value)
    if differing:
        _send(results, f"it runs with another {', '.join(differing)} than the engine")
        os._exit(0)
    runners = Deployment.for_shapes(job.config, job.plan, job.pages, job.adapters).runners
    lock = threading.Lock()

    def compile_and_send(index: int) -> None:
        from qwen_jax.engine.core.background_compiler import CompiledProgram

        replica, key = job.keys[index]
        began = time.perf_counter()
        payload = serialized(runners[replica].steps.lower(key).compile())
        with lock:
            _send(results, CompiledProgram(index, payload, time.perf_counter() - began))

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        list(threads.map(compile_and_send, range(len(job.keys))))
    os._exit(0)  # at an orderly end Python would wait for the thread that reads


def _send(stream: BinaryIO, message: object) -> None:
    pickle.dump(message, stream)
    stream.flush()


def _exit_at_end_of(stream: BinaryIO) -> None:
    stream.read()
    os._exit(ENDED)


if __name__ == "__main__":
    main()
