"""TCP connections to other machines: their options, and taking those of peers among those of strangers."""

from __future__ import annotations

import queue
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Peer = TypeVar("Peer")
GREETING_SECONDS = 10  # in which a connection has to send what is awaited next, until its peer is recognized
POLL_SECONDS = 0.05


def allow_many_connections() -> None:
    """Let this process, and processes that it starts, have as many open connections and files as the system allows.

    Systems begin with few, 1,024 mostly, which a server's clients, or strangers who connect, use up.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def accept_peers(listener: socket.socket, count: int, recognize: Callable[[socket.socket], Peer],
                 seconds: float | None = None) -> list[Peer]:
    """Wait for connections of ``count`` peers and return what ``recognize`` makes of each.

    Every connection is greeted on a thread of its own, so that a stranger who sends nothing, or nonsense, or hangs up
    delays no peer.

    Args:
      recognize: reads from a new connection, raises any exception if it is a stranger's, and returns the peer.
      seconds: time after which TimeoutError is raised; None waits for ever.
    """
    found: queue.SimpleQueue[Peer] = queue.SimpleQueue()

    def greet(connection: socket.socket) -> None:
        try:
            _set_timeout(connection, GREETING_SECONDS)
            peer = recognize(connection)
        except Exception:
            connection.close()
        else:
            found.put(peer)

    listener.settimeout(POLL_SECONDS)
    end = None if seconds is None else time.monotonic() + seconds
    while found.qsize() < count:
        if end is not None and time.monotonic() > end:
            raise TimeoutError(f"{found.qsize()} of {count} peers have connected in {seconds:g} s")
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError:  # it has hung up already, or too many files are open
            time.sleep(POLL_SECONDS)
            continue
        threading.Thread(target=greet, args=(connection,), daemon=True).start()
    return [found.get() for _ in range(count)]


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes; EOFError when the connection ends before."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the connection has ended")
        data += part
    return data


def without_timeout(connection: socket.socket) -> None:
    """Let reads from a connection that `accept_peers` has greeted, and writes to it, wait for ever."""
    _set_timeout(connection, 0)


def _set_timeout(connection: socket.socket, seconds: int) -> None:
    """Have the kernel end reads and writes of a connection after some seconds, 0 for never, also in other objects."""
    connection.setblocking(True)
    for name in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, name, struct.pack("ll", seconds, 0))


def set_keepalive(connection: socket.socket, idle: int, interval: int, limit: float) -> None:
    """Set a TCP connection to send small messages at once, and to close when the other machine has gone silent.

    Args:
      idle: seconds of silence after which the kernel probes the other machine.
      interval: seconds between its three probes.
      limit: seconds for which sent data may stay unacknowledged.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", 3),
                        ("TCP_USER_TIMEOUT", int(limit * 1000))):
        if hasattr(socket, name):  # other systems than Linux lack some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
