"""The Ray actor that runs a process of an engine on its node and holds the devices of that process."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import subprocess
from collections.abc import Mapping

import ray

from qwen_jax.serving.ipc.engine_client import ENGINE_COMMAND, ENGINE_ENVIRONMENT
from qwen_jax.serving.ipc.messages import Launch, frame
from qwen_jax.sockets import accept_peers, receive_exactly, set_keepalive, without_timeout

TOKEN_BYTES = 32
CONNECT_SECONDS = 60  # for the gateway to connect
KEEPALIVE = 10, 5, 25.0  # arguments of `set_keepalive`: a machine that is gone is noticed within half a minute


@ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=4)
class Host:
    """Ray actor that runs a process of an engine. Ray chooses its node and names its GPUs in the environment."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def listen(self) -> tuple[str, int, bytes]:
        """Open a port for the gateway; return address and port, and the token that the gateway must send first."""
        self._address, self._token = ray.util.get_node_ip_address(), secrets.token_bytes(TOKEN_BYTES)
        self._listener = socket.create_server((self._address, 0))
        return *self._listener.getsockname()[:2], self._token

    def free_port(self) -> tuple[str, int]:
        """Return an address and a port at which the first process of an engine can wait for the others."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def lead(self, environment: Mapping[str, str]) -> int:
        """Run the engine's first process, which talks to the gateway, to its end; return its exit code."""
        with self._listener:
            connection, = accept_peers(self._listener, 1, self._recognize, CONNECT_SECONDS)
        with connection:
            set_keepalive(connection, *KEEPALIVE)
            self._start(connection, environment)
        return self._process.wait()

    def follow(self, launch: Launch, environment: Mapping[str, str]) -> int:
        """Run another process of the engine to its end; return its exit code. ``launch`` is its first message."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._start(theirs, environment)
            ours.sendall(frame(launch))
            return self._process.wait()

    def end(self) -> None:
        """Kill the engine's process that this actor runs."""
        if self._process:
            self._process.kill()

    def _recognize(self, connection: socket.socket) -> socket.socket:
        """Return a connection if it is the gateway's, which sends the token first; raise an exception otherwise."""
        if not hmac.compare_digest(receive_exactly(connection, TOKEN_BYTES), self._token):
            raise PermissionError("another token")
        without_timeout(connection)
        return connection

    def _start(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [*ENGINE_COMMAND, str(connection.fileno())], pass_fds=[connection.fileno()],
            env={**ENGINE_ENVIRONMENT, **os.environ, **environment})
