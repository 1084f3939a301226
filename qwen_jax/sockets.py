"""TCP connections to other machines."""

from __future__ import annotations

import socket


def steady(connection: socket.socket, idle: int, interval: int, limit: float) -> None:
    """Sends small messages at once, and has the kernel notice the other machine's silence.

    Args:
      idle: seconds of silence before it asks; interval: between the three times that it does.
      limit: seconds for which what was sent may stay unacknowledged.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", 3),
                        ("TCP_USER_TIMEOUT", int(limit * 1000))):
        if hasattr(socket, name):  # elsewhere than on Linux some are missing
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
