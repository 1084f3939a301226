"""Socket options of TCP connections to other machines: keepalive and no delay."""

from __future__ import annotations

import socket


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
