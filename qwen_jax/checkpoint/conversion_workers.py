"""Conversion by several processes of one machine, each of which writes groups of parameters to a folder of its own.

Orbax's partial save is for one process: two that save to one folder collide on its temporary name. So every process
makes a checkpoint of the groups that it converted, and the checkpoints are joined at the end by renaming.

The processes are programs of their own at the other end of a pipe. `multiprocessing.Process` would run the caller's
main module again in each of them, which a script without a guard, or one that comes from stdin, does not survive.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.checkpoint import orbax_store
from qwen_jax.checkpoint.conversion_groups import GroupConverter
from qwen_jax.checkpoint.tensors import progress
from qwen_jax.errors import UserError

_PROGRAM = f"from {__name__} import main; main()"


def write_in_processes(folder: Path, converter: GroupConverter, processes: int) -> dict[str, dict[str, Any]]:
    """Convert a model's parameters in several processes into a new Orbax checkpoint at ``folder``.

    Returns the manifest's entry (element type, shape, SHA-256) of each tensor by its name.

    The processes' own checkpoints lie beside ``folder`` until they are joined. When a process fails or dies, the others
    are stopped and its error is raised: a UserError for bad input, and for a process that was killed.
    """
    groups = converter.groups
    entries: list[dict[str, Any]] = [{}] * len(groups)
    # The largest first, so that no large group is left for one process at the end; the others in the order on disk.
    waiting = deque(sorted(range(len(groups)), key=lambda index: -converter.group_bytes(groups[index])))
    parts = [folder.parent / f"part-{index}" for index in range(min(processes, len(waiting)))]
    first = [waiting.popleft() for _ in parts]  # each process has something to do, however late it starts
    taking, errors = threading.Lock(), []

    def drive(worker: _Worker, part: Path, index: int | None) -> None:
        try:
            worker.send((converter, part))
            while index is not None:
                entries[index] = worker.ask(groups[index])
                bar.update(converter.group_bytes(groups[index]))
                with taking:
                    index = waiting.popleft() if waiting else None
            worker.ask(None)
        except Exception as error:
            errors.append(error)
            raise

    workers: list[_Worker] = []
    with ThreadPoolExecutor(len(parts)) as pool, progress(sum(converter.sizes.values()), "converting") as bar:
        try:
            for _ in parts:
                workers.append(_Worker())
            wait([pool.submit(drive, *work) for work in zip(workers, parts, first, strict=True)],
                 return_when=FIRST_EXCEPTION)
        finally:
            for worker in workers:
                worker.stop()
    if errors:
        raise errors[0]
    orbax_store.join(folder, parts)
    return {name: entry for group in entries for name, entry in group.items()}


class _Worker:
    """A process that converts groups of parameters into an Orbax checkpoint, as seen by the process that started it."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        # What this process can import the other can too. It needs no accelerator, and must not reserve one's memory.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(theirs.fileno())], env=environment,
                                         pass_fds=[theirs.fileno()])
        theirs.close()  # so that reading fails when the other process has ended

    def send(self, order: Any) -> None:
        """Send the process an order: a pair of converter and folder, a group to convert, or None for the end."""
        try:
            self._pipe.send(order)
        except OSError:
            pass  # the process has ended; its last answer may still be readable

    def ask(self, group: list[str] | None) -> dict[str, Any]:
        """Let the process convert a group, or with None finish its checkpoint; return the tensors' manifest entries."""
        self.send(group)
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(f"one of the processes that convert {how}, and nothing was kept: run it again, with fewer "
                            "processes if memory is short") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Convert groups of parameters in this process, which `_Worker` started, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops this process
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for the parent's results
    pipe = Connection(int(sys.argv[1]))
    orders: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    try:
        converter, part = orders.get()
        orbax_store.write(part, _converted(converter, orders, pipe))
        pipe.send({})
    except UserError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"a process that converts failed:\n{traceback.format_exc()}"))


def _converted(converter: GroupConverter, orders: queue.SimpleQueue, pipe: Connection
               ) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of each group that is ordered, and send the parent process its entries once it is written."""
    while (group := orders.get()) is not None:
        arrays, entries = converter.convert(group)
        yield arrays  # the next group is asked for when these are written
        del arrays
        pipe.send(entries)


def _listen(pipe: Connection, orders: queue.SimpleQueue) -> None:
    """Put the parent process's orders into a queue, and end this process at once when the parent has ended."""
    try:
        while True:
            orders.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)
