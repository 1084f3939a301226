"""Ray actors that the processes of engines run under: one per process, with its devices."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import ray

from qwen_jax.serving.ipc.messages import frame
from qwen_jax.sockets import steady

TOKEN_BYTES = 32
CALL_SECONDS = 60  # for the gateway to connect
SILENCE = 10, 5, 25.0  # see `steady`: a machine that is gone is noticed within half a minute


@ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=4)
class Host:
    """One process. Ray has chosen its node, and says in the environment which GPUs it has."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def listen(self) -> tuple[str, int, bytes]:
        """Address and token with which the gateway is to connect."""
        self._address, self._token = ray.util.get_node_ip_address(), secrets.token_bytes(TOKEN_BYTES)
        self._listener = socket.create_server((self._address, 0))
        return *self._listener.getsockname()[:2], self._token

    def free_port(self) -> tuple[str, int]:
        """For processes of one engine to find each other: where the first of them listens."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def lead(self, environment: Mapping[str, str]) -> int:
        """Runs the engine's process, which talks to the gateway itself, to its end; its exit code."""
        self._listener.settimeout(CALL_SECONDS)
        with self._listener:
            connection = self._accept()
        with connection:
            steady(connection, *SILENCE)
            self._start(connection, environment)
        return self._process.wait()

    def follow(self, first: list[Any], environment: Mapping[str, str]) -> int:
        """Runs another process of an engine; ``first``: its first frame."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._start(theirs, environment)
            ours.sendall(frame(*first))
            return self._process.wait()

    def end(self) -> None:
        """The process, whatever it is doing."""
        if self._process:
            self._process.kill()

    def _accept(self) -> socket.socket:
        """The first connection that knows the token."""
        while True:
            connection, _ = self._listener.accept()
            connection.settimeout(CALL_SECONDS)
            try:
                said = connection.recv(TOKEN_BYTES, socket.MSG_WAITALL)
            except OSError:
                said = b""
            if hmac.compare_digest(said, self._token):
                connection.settimeout(None)
                return connection
            connection.close()

    def _start(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwen_jax.serving.engine_process.process", str(connection.fileno())],
            pass_fds=[connection.fileno()], env={**os.environ, **environment})
