"""The gateway's connection to an engine's process on another node, among those of strangers."""
import socket
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from qwen_jax.cluster.ray_serve import host as module  # noqa: E402


def test_a_silent_stranger_does_not_delay_the_gateway(monkeypatch):
    monkeypatch.setattr(module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    host = module.Host.__ray_metadata__.modified_class()
    received = []
    host._start = lambda connection, environment: received.append(connection.recv(5))
    host._process = SimpleNamespace(wait=lambda: 0)
    address, port, token = host.listen()
    codes = []
    leading = threading.Thread(target=lambda: codes.append(host.lead({})), daemon=True)
    leading.start()
    with socket.create_connection((address, port)), socket.create_connection((address, port)) as wrong:
        wrong.sendall(b"#" * len(token))
        with socket.create_connection((address, port)) as gateway:
            gateway.sendall(token + b"hello")
            leading.join(3)
            assert codes == [0] and received == [b"hello"]
