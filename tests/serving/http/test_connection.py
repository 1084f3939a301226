"""Connections that are slow, silent or crowded, at a server whose application answers at once."""
import asyncio
import contextlib
import time

import pytest
import uvicorn
from live import free_port

from qwen_jax.serving.http import connection
from qwen_jax.serving.http.connection import MAX_PIPELINED, Connection

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


async def answers_late(scope, receive, send):
    """Answer an HTTP request, after its body, in a tenth of a second."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(0.1)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def talk(conversation):
    """Run a conversation, a coroutine function of a reader and a writer, with a server; return its result."""
    async def run():
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(answers_late, port=port, http=Connection, lifespan="off", ws="none",
                                               log_level="critical"))
        server.capture_signals = contextlib.nullcontext
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            return await asyncio.wait_for(conversation(reader, writer), 10)
        finally:
            writer.close()
            server.should_exit = True
            await serving

    return asyncio.run(run())


@pytest.mark.parametrize("before, begun", [
    (b"", b""), (b"", b"GET /"), (b"", b"\r\n"), (HEALTH, b"\r\n"), (HEALTH, b"GET /health HTTP/1.1\r\nhost: x\r\n"),
    (b"", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"),
    (b"", b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")])
def test_a_connection_is_closed_when_its_request_does_not_arrive(monkeypatch, before, begun):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.3)

    async def conversation(reader, writer):
        if before:
            writer.write(before)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.write(begun)
        began = time.monotonic()
        assert await reader.read() == b""
        return time.monotonic() - began

    assert 0.2 < talk(conversation) < 3


def test_a_request_that_arrives_slowly_but_in_time_is_answered(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)

    async def conversation(reader, writer):
        answers = []
        for _ in range(2):  # the first one's time does not count for the second
            for part in (b"GET /health HTTP/1.1\r\n", b"host: x\r\n\r\n"):
                writer.write(part)
                await asyncio.sleep(0.3)
            answers.append(await reader.readuntil(b"\r\n\r\n"))
        return answers

    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in talk(conversation))


def test_few_requests_may_wait_on_a_connection():
    async def conversation(reader, writer):
        writer.write(HEALTH * MAX_PIPELINED)
        for _ in range(MAX_PIPELINED):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.write(HEALTH * 10_000)
        answers = b""
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                answers += part
        return answers.count(b"HTTP/1.1 200 ")

    assert talk(conversation) <= 1
