"""Several processes, each with devices of its own, as one engine: how they find each other and what they say.

Programs over the devices of several processes run when all of them start the same programs in the same order. So
process 0 decides (`Leader`), and the others do what it tells them (`Follower`). None of them can go on without the
others: when one ends, so do all.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import queue
import secrets
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
from jax._src import distributed  # its key-value store has no public name

from qwen_jax.errors import UserError
from qwen_jax.sockets import steady

HEARTBEAT_SECONDS = 20  # after which JAX gives up a process that was silent; a broken connection is noticed at once
WAIT_SECONDS = 600  # for another process to come as far as this one
_engines = itertools.count()  # of this process: the same engine has the same number in all of them


def connect() -> Leader | Follower | None:
    """This process's side of a new engine, once all processes have called this; None when there is only one."""
    if jax.process_count() == 1:
        return None
    state, key = distributed.global_state, f"qwen_jax/engine/{next(_engines)}"
    if jax.process_index() == 0:
        password = secrets.token_bytes(32)
        with Listener(("", 0), authkey=password) as listener:
            state.client.key_value_set(key, f"{listener.address[1]}:{password.hex()}")
            connections = {}
            while len(connections) < jax.process_count() - 1:
                connection = listener.accept()
                connections[connection.recv()] = connection
        return Leader(connections)
    port, password = state.client.blocking_key_value_get(key, WAIT_SECONDS * 1000).split(":")
    host = state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    connection = Client((host, int(port)), authkey=bytes.fromhex(password))
    connection.send(jax.process_index())
    return Follower(connection)


class Leader:
    """Process 0's connections to the others, by process."""

    def __init__(self, connections: Mapping[int, Connection]) -> None:
        self._connections = {process: _steady(one) for process, one in sorted(connections.items())}
        self._lock, self._numbers, self._closing = threading.Lock(), itertools.count(), False
        self._answers: dict[tuple[int, Any], Future] = defaultdict(Future)
        for process, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(process, connection), daemon=True).start()
        atexit.register(self.close)

    def tell(self, command: str, *arguments: Any, number: int | None = None) -> None:
        """The other processes do this too, after all that they were told before. Any thread may call this."""
        message = pickle.dumps((command, number, arguments))
        with self._lock:
            for process, connection in self._connections.items():
                try:
                    connection.send_bytes(message)
                except OSError:
                    _end_all(process)

    def ask(self, command: str, *arguments: Any) -> Callable[[], None]:
        """As `tell`; what is returned waits until all have done it. UserError when one could not."""
        number = next(self._numbers)
        self.tell(command, *arguments, number=number)

        def wait() -> None:
            errors = [f"process {process}: {error}" for process in self._connections
                      if (error := self._answer(process, number)) is not None]
            if errors:
                raise UserError("; ".join(errors))

        return wait

    def agree(self, name: str, value: Any) -> list[Any]:
        """Every process's value, by process, once all have called this."""
        values = [value, *(self._answer(process, name) for process in self._connections)]
        self.tell(name, values)
        return values

    def close(self) -> None:
        """No more comes: the others return from `Follower.commands`."""
        if not self._closing:
            self._closing = True
            self.tell("end")

    def _answer(self, process: int, key: Any) -> Any:
        with self._lock:
            future = self._answers[process, key]
        answer = future.result()
        del self._answers[process, key]
        return answer

    def _listen(self, process: int, connection: Connection) -> None:
        try:
            while True:
                key, value = connection.recv()
                with self._lock:
                    future = self._answers[process, key]
                future.set_result(value)
        except (EOFError, OSError):
            if not self._closing:
                _end_all(process)


class Follower:
    """Another process's connection to process 0."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = _steady(connection), threading.Lock()
        self._commands: queue.SimpleQueue[tuple[str, int | None, tuple]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def commands(self) -> Iterator[tuple[str, int | None, tuple]]:
        """What process 0 says, until it has no more: a command, the number of the `answer` that it waits for, or None,
        and arguments."""
        while (command := self._commands.get())[0] != "end":
            yield command

    def answer(self, number: int, error: str | None) -> None:
        """That a command has been done, or why it could not be. Any thread may call this."""
        self._send(number, error)

    def agree(self, name: str, value: Any) -> list[Any]:
        """As `Leader.agree`."""
        self._send(name, value)
        told, _, (values,) = self._commands.get()
        assert told == name, f"process 0 is at {told} and this one at {name}"
        return values

    def _send(self, key: Any, value: Any) -> None:
        with self._lock:
            self._connection.send((key, value))

    def _listen(self) -> None:
        try:
            while True:
                message = pickle.loads(self._connection.recv_bytes())
                self._commands.put(message)
                if message[0] == "end":
                    return
        except (EOFError, OSError):
            _end_all(0)


def _steady(connection: Connection) -> Connection:
    with socket.socket(fileno=os.dup(connection.fileno())) as options:
        steady(options, 5, 3, 15.0)
    return connection


def _end_all(process: int) -> None:
    """Ends this process, which may be waiting for another in a program on its devices: nothing gentler ends that."""
    print(f"qwen-jax: process {process} of {jax.process_count()} has ended; process {jax.process_index()} cannot go on "
          "without it and ends too", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
