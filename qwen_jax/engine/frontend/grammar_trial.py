"""Trial of grammars: each is compiled first in a process that may die, with little time and memory.

The grammar library's time, memory and stack are not bounded by its own limits: a chain of references overflows the
stack, and an intersection of patterns doubles its work with each pattern. What it compiles cannot be handed to another
process, so a grammar that survives its trial is compiled a second time, here.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

COMMAND = (sys.executable, "-m", "qwen_jax.engine.frontend.trial_process")
CPU_SECONDS, MEMORY_BYTES, STACK_BYTES = 1.0, 64 << 20, 16 << 20
WALL_SECONDS = 5  # for a processor that is shared with others
STARTS = 2  # of the process for one grammar, before its trial is given up
BEGUN = b"+"  # what a trial sends first


class GrammarTrial:
    """Trial of grammars in another process, which starts with the first one. Several threads may use it.

    The process knows llguidance and no tokenizer: its vocabulary is the bytes and the special tokens. It forks a child
    for each grammar, so nothing is left of a trial, and a trial that dies costs no new process.

    Args:
      vocabulary: arguments of ``trial_process.ByteVocabulary``.

    Attributes:
      process: the process, once it was started.
    """

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        self._vocabulary = vocabulary
        self.process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._end: Callable[[], Any] = lambda: None  # ends the process

    def start(self) -> socket.socket:
        """Start the process unless it runs; return the socket that takes trials. Does not wait until it is ready."""
        with self._lock:
            if self._control is None:
                self._control, theirs = socket.socketpair()
                with theirs:
                    self.process = subprocess.Popen([*COMMAND, str(theirs.fileno())], stdin=subprocess.PIPE,
                                                    pass_fds=[theirs.fileno()])
                self._end = weakref.finalize(self, _end, self.process, self._control)
                with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
                    stdin.write(json.dumps(self._vocabulary).encode())
            return self._control

    def check(self, definition: str) -> int:
        """Compile a grammar in the process; return the bytes that it took. ValueError with the reason if it cannot be.

        Returns within seconds. RuntimeError if the process cannot run.
        """
        for _ in range(STARTS):
            control = self.start()
            answer = _ask(control, definition)
            if answer == BEGUN:
                raise ValueError(f"compiling it takes more than {CPU_SECONDS:g} s or {MEMORY_BYTES >> 20} MB, or its "
                                 f"references are nested too deep: simplify it")
            if answer.startswith(BEGUN):
                result = json.loads(answer.removeprefix(BEGUN))
                if result["reason"] is not None:
                    raise ValueError(result["reason"])
                return result["bytes"]
            with self._lock:  # the process has ended, or cannot fork
                if self._control is control:
                    self._end()
                    self._control = None
        raise RuntimeError("the process that tries grammars ends: its reason is on stderr")


def _ask(control: socket.socket, definition: str) -> bytes:
    """Have a grammar tried; return what the trial sent: nothing if it did not begin, `BEGUN` alone if it died."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(2 * WALL_SECONDS)
        with contextlib.suppress(OSError):
            with theirs:
                socket.send_fds(control, [b"\0"], [theirs.fileno()])
            ours.sendall(definition.encode())
            ours.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: ours.recv(1 << 16), b""))
    return b""


def _end(process: subprocess.Popen, control: socket.socket) -> None:
    control.close()
    process.kill()
    process.wait()
