"""Conversion by several processes of one machine: each writes groups of parameters to a folder of its own.

Orbax's partial save is for one process: two that save to one folder collide on its temporary name. So every process
makes a checkpoint of what it converted, and these are joined at the end by renaming.

A worker reads its orders, a JSON list of paths per line, from stdin, and answers each with a line on stdout when the
group is written. When stdin ends it exits at once: a parent that was killed leaves nobody at work.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.conversion_groups import Pieces
from qwen_jax.checkpoint.source import Source
from qwen_jax.checkpoint.tensors import progress
from qwen_jax.errors import UserError

_PROGRAM = f"from {__name__} import main; main()"


def write_in_processes(folder: Path, source: Source, dtype: str | None, fp8: bool, pieces: Pieces,
                       processes: int) -> dict[str, dict[str, Any]]:
    """Write ``pieces`` to a new Orbax checkpoint at ``folder``; returns what the manifest says of the tensors.

    Parts lie beside ``folder`` until they are joined. When a process fails or dies, the others are stopped and its
    error is raised: a UserError for bad input, and for a process that was killed.
    """
    entries: list[dict[str, Any]] = [{}] * len(pieces.groups)
    # The largest first, so that none of them is left for one process at the end; others in the order on disk.
    waiting = deque(sorted(range(len(pieces.groups)), key=lambda index: -pieces.size(pieces.groups[index])))
    parts = [folder.parent / f"part-{index}" for index in range(min(processes, len(waiting)))]
    first = [waiting.popleft() for _ in parts]  # each has something to do, however late it starts
    taking, errors = threading.Lock(), []

    def drive(worker: _Worker, index: int | None) -> None:
        try:
            while index is not None:
                entries[index] = worker.ask(pieces.groups[index])
                bar.update(pieces.size(pieces.groups[index]))
                with taking:
                    index = waiting.popleft() if waiting else None
            worker.ask(None)
        except Exception as error:
            errors.append(error)
            raise

    workers: list[_Worker] = []
    with ThreadPoolExecutor(len(parts)) as pool, progress(sum(pieces.sizes.values()), "converting") as bar:
        try:
            for part in parts:
                workers.append(_Worker([str(source.path), str(part), dtype, fp8]))
            wait([pool.submit(drive, *one) for one in zip(workers, first, strict=True)], return_when=FIRST_EXCEPTION)
        finally:
            for worker in workers:
                worker.stop()
    if errors:
        raise errors[0]
    orbax_store.join(folder, parts)
    return {name: entry for group in entries for name, entry in group.items()}


class _Worker:
    """A process that converts, seen from the one that started it."""

    def __init__(self, arguments: list[Any]) -> None:
        # What this process can import the other can too. It needs no accelerator, and must not reserve one's memory.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen([sys.executable, "-c", _PROGRAM, json.dumps(arguments)], env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, group: list[str] | None) -> dict[str, Any]:
        """Has a group converted, or with None the part finished, and waits for it."""
        try:
            self._process.stdin.write(json.dumps(group) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended may still be readable
        answer = json.loads(self._process.stdout.readline() or "{}")
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "failed" in answer:
            raise RuntimeError(f"a process that converts failed:\n{answer['failed']}")
        if "done" not in answer:
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(f"one of the processes that convert {how}, and nothing was kept: run it again, with fewer "
                            "processes if memory is short")
        return answer["done"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """The process that converts."""
    source, part, dtype, fp8 = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops this process
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what else is printed is no answer

    def answer(**kind: Any) -> None:
        print(json.dumps(kind), file=answers, flush=True)

    orders: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    try:
        orbax_store.write(Path(part), _converted(Pieces(Source("hf", Path(source)), dtype, fp8), orders, answer))
        answer(done={})
    except UserError as error:
        answer(refused=str(error))
    except Exception:
        answer(failed=traceback.format_exc())


def _converted(pieces: Pieces, orders: queue.SimpleQueue, answer: Callable[..., None]
               ) -> Iterator[dict[str, np.ndarray]]:
    while (group := orders.get()) is not None:
        arrays, entries = pieces.convert(group)
        yield arrays  # the next is asked for when these are written
        del arrays
        answer(done=entries)


def _listen(orders: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(1)
