"""Messages between the processes of one engine, each of which drives devices of its own.

Programs over the devices of several processes run when all of them start the same programs in the same order. So
process 0 decides (`Leader`), and the others do what it tells them (`Follower`). No process can go on without the
others: when one ends, all end.
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
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # its key-value store has no public name

from qwen_jax.errors import UserError
from qwen_jax.sockets import accept_peers, set_keepalive, without_timeout

HEARTBEAT_SECONDS = 20  # silence after which JAX gives up a process; a broken connection is noticed at once
WAIT_SECONDS = 600  # longest wait for another process to come as far as this one
_engine_numbers = itertools.count()  # the same engine has the same number in every process


class Command(NamedTuple):
    """A command that process 0 sends to the other processes.

    Attributes:
      name: what to do, such as "step" or "load_weights".
      number: number under which process 0 waits for a `Follower.answer`, or None when it does not wait.
      arguments: positional arguments of the command.
    """

    name: str
    number: int | None
    arguments: tuple[Any, ...]


def connect() -> Leader | Follower | None:
    """Connect the processes of a new engine, and return this process's end; None where there is a single process.

    Waits until all processes have called it. Process 0 gets the `Leader`, every other process a `Follower`.
    """
    if jax.process_count() == 1:
        return None
    state, key = distributed.global_state, f"qwen_jax/engine/{next(_engine_numbers)}"
    if jax.process_index() == 0:
        password = secrets.token_bytes(32)
        with socket.create_server(("", 0)) as listener:
            state.client.key_value_set(key, f"{listener.getsockname()[1]}:{password.hex()}")
            others = accept_peers(listener, jax.process_count() - 1, lambda stranger: _recognize(stranger, password))
        return Leader(dict(others))
    port, password = state.client.blocking_key_value_get(key, WAIT_SECONDS * 1000).split(":")
    host = state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    connection = Client((host, int(port)), authkey=bytes.fromhex(password))
    connection.send(jax.process_index())
    return Follower(connection)


def _recognize(stranger: socket.socket, password: bytes) -> tuple[int, Connection]:
    """Return index of and connection to a process that knows the password; raise an exception for any other peer."""
    connection = Connection(os.dup(stranger.fileno()))
    try:
        deliver_challenge(connection, password)
        answer_challenge(connection, password)
        process = connection.recv()
    except BaseException:
        connection.close()
        raise
    without_timeout(stranger)
    stranger.close()
    return process, connection


class Leader:
    """Connections of process 0 to the other processes: sends them commands and collects their answers.

    Args:
      connections: index of a process -> connection to it.
    """

    def __init__(self, connections: Mapping[int, Connection]) -> None:
        self._connections = {process: _with_keepalive(connection)
                             for process, connection in sorted(connections.items())}
        self._lock, self._numbers, self._closing = threading.Lock(), itertools.count(), False
        self._answers: dict[tuple[int, Any], Future] = defaultdict(Future)
        for process, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(process, connection), daemon=True).start()
        atexit.register(self.close)

    def tell(self, command: str, *arguments: Any, number: int | None = None) -> None:
        """Send the other processes a command, which they run after the commands sent before. Any thread may call this.

        number: number under which the caller waits for answers (see `Command`); only `ask` gives one.
        """
        message = pickle.dumps(Command(command, number, arguments))
        with self._lock:
            for process, connection in self._connections.items():
                try:
                    connection.send_bytes(message)
                except OSError:
                    _end_all(process)

    def ask(self, command: str, *arguments: Any) -> Callable[[], None]:
        """Send the other processes a command, and return a function that waits until all of them have run it.

        The function raises UserError with the reasons of the processes that could not run the command.
        """
        number = next(self._numbers)
        self.tell(command, *arguments, number=number)

        def wait() -> None:
            errors = [f"process {process}: {error}" for process in self._connections
                      if (error := self._answer(process, number)) is not None]
            if errors:
                raise UserError("; ".join(errors))

        return wait

    def agree(self, name: str, value: Any) -> list[Any]:
        """Exchange a value: return, in order, the values that all processes passed under the same name."""
        values = [value, *(self._answer(process, name) for process in self._connections)]
        self.tell(name, values)
        return values

    def close(self) -> None:
        """Tell the other processes that no command follows, so that they return from `Follower.commands`."""
        if not self._closing:
            self._closing = True
            self.tell("end")

    def _answer(self, process: int, key: Any) -> Any:
        """Wait for and return what a process sends under a key: a command's number or the name of a value."""
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
    """Connection to process 0 of a process other than process 0: receives its commands and answers them."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = _with_keepalive(connection), threading.Lock()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def commands(self) -> Iterator[Command]:
        """Yield process 0's commands, until it closes its connections."""
        while (command := self._commands.get()).name != "end":
            yield command

    def answer(self, number: int, error: str | None) -> None:
        """Tell process 0 that a command has been run (error: None), or why it failed. Any thread may call this."""
        self._send(number, error)

    def agree(self, name: str, value: Any) -> list[Any]:
        """Send process 0 this process's value, and return the values of all processes, as `Leader.agree` does."""
        self._send(name, value)
        received, _, (values,) = self._commands.get()
        assert received == name, f"process 0 is at {received} and process {jax.process_index()} at {name}"
        return values

    def _send(self, key: Any, value: Any) -> None:
        with self._lock:
            self._connection.send((key, value))

    def _listen(self) -> None:
        try:
            while True:
                command = pickle.loads(self._connection.recv_bytes())
                self._commands.put(command)
                if command.name == "end":
                    return
        except (EOFError, OSError):
            _end_all(0)


def _with_keepalive(connection: Connection) -> Connection:
    with socket.socket(fileno=os.dup(connection.fileno())) as options:
        set_keepalive(options, idle=5, interval=3, limit=15.0)
    return connection


def _end_all(process: int) -> None:
    """End this process at once, because another has ended.

    The process may be waiting for the other in a program on its devices, which only its end can interrupt.
    """
    print(f"qwen-jax: process {process} of {jax.process_count()} has ended; process {jax.process_index()} cannot go on "
          "without it and ends too", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
