"""Processes that join an engine while strangers connect to the port at which process 0 waits for them."""
import socket
import struct
import threading
import time
from multiprocessing.connection import Client
from types import SimpleNamespace

import jax
import pytest

from qwen_jax.engine.multihost import channel


@pytest.fixture
def address(monkeypatch):
    """A function that waits for the address and the password at which process 0 of three waits for the others."""
    published = {}
    client = SimpleNamespace(key_value_set=lambda key, value: published.update(value=value))
    monkeypatch.setattr(channel.distributed, "global_state", SimpleNamespace(client=client))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 0)

    def wait():
        end = time.monotonic() + 10
        while not published:
            assert time.monotonic() < end
            time.sleep(0.01)
        port, password = published["value"].split(":")
        return ("127.0.0.1", int(port)), bytes.fromhex(password)

    return wait


GREETINGS = {"hangs up": None, "is silent": b"", "speaks HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
             "announces two gigabytes": struct.pack("!i", 2**31 - 1),
             "does not know the password": struct.pack("!i", 20) + b"#" * 20}


def test_strangers_neither_end_nor_delay_the_start(address):
    joined = []
    joining = threading.Thread(target=lambda: joined.append(channel.connect()), daemon=True)
    joining.start()
    (host, port), password = address()
    strangers = []

    def strangers_come():
        for greeting in GREETINGS.values():
            strangers.append(socket.create_connection((host, port)))
            if greeting:
                strangers[-1].sendall(greeting)
            if greeting is None:
                strangers[-1].close()

    hosts = []
    for index in (1, 2):
        strangers_come()
        hosts.append(Client((host, port), authkey=password))
        hosts[-1].send(index)
    joining.join(5)
    assert joined and not joining.is_alive()
    joined[0].tell("work", 7)
    joined[0].close()
    for connection in hosts:
        assert [channel.pickle.loads(connection.recv_bytes())[:1] for _ in range(2)] == [("work",), ("end",)]
    for one in (*strangers, *hosts):
        one.close()
