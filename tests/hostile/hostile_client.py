"""Client that sends hostile requests, byte by byte where it must, and asks for a normal answer between them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_SECONDS = 60.0  # for an answer, or the end of the connection
NORMAL_SECONDS = 2.0  # for a normal answer between hostile requests
MAX_ERROR_BYTES = 8192  # of an error's body: what a client sent is not sent back whole
NORMAL = {"model": "bundled", "prompt": "amount 328 card limit", "max_tokens": 8, "temperature": 0, "ignore_eos": True}

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SHORT = {"model": "bundled", "max_tokens": 2, "temperature": 0}
HELLO = [{"role": "user", "content": "hello"}]
VALID: dict[str, dict[str, Any]] = {
    COMPLETIONS: {**SHORT, "prompt": "hello"}, CHAT: {**SHORT, "messages": HELLO},
    EMBEDDINGS: {"model": "bundled", "input": "hello"}, "/tokenize": {"prompt": "hello"},
    "/score": {"model": "bundled", "prompt": "hello", "continuation": " you"},
    "/classify": {"model": "bundled", "input": "hello", "labels": [" yes", " no"]},
    "/detokenize": {"tokens": [5, 6, 7]}, LOAD: {"lora_name": "a", "lora_path": "none"}, UNLOAD: {"lora_name": "a"}}


@dataclass(frozen=True)
class Hostile:
    """A hostile request on a connection of its own.

    Attributes:
      parts: bytes to send, and seconds to wait between them.
      leaves: seconds after which the client hangs up; None if it stays until the connection has ended.
      reads: whether the client reads what it is sent.
      silent: whether the server may end the connection without an answer.
    """

    parts: tuple[bytes | float, ...]
    leaves: float | None = None
    reads: bool = True
    silent: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of hostile requests.

    Attributes:
      make: makes a request of this kind from random numbers.
      at_once: number of requests sent at the same time.
      short: number of requests in the short form of the tests.
    """

    make: Callable[[random.Random], Hostile]
    at_once: int = 8
    short: int = 16


@dataclass(frozen=True)
class Outcome:
    """What came of a hostile request.

    Attributes:
      status: HTTP status of the first answer; None without one.
      seconds: time until the answer or the connection ended.
      problem: what the server did that it must not do; None if there is nothing.
    """

    status: int | None
    seconds: float
    problem: str | None


def http(method: str, path: str | bytes, body: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a request of HTTP/1.1, which is the last of its connection."""
    path = path.encode() if isinstance(path, str) else path
    lines = [method.encode() + b" " + path + b" HTTP/1.1", b"host: x", b"connection: close",
             *(name + b": " + value for name, value in headers)]
    if body or method == "POST":
        lines += [b"content-type: application/json", b"content-length: %d" % len(body)]
    return b"\r\n".join([*lines, b"", body])


def post(path: str, body: object, headers: Sequence[tuple[bytes, bytes]] = ()) -> Hostile:
    """Return a request with a body, which is sent as JSON unless it is bytes."""
    return Hostile((http("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers),))


async def send(hostile: Hostile, port: int) -> Outcome:
    """Send a hostile request and wait until its connection has ended, or until its client leaves."""
    began, content, ended = time.monotonic(), b"", False
    writer = None
    try:
        async with asyncio.timeout(hostile.leaves or ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            sending = asyncio.create_task(_send_parts(writer, hostile.parts))
            try:
                if not hostile.reads:
                    writer.transport.pause_reading()
                    await asyncio.sleep(ANSWER_SECONDS)
                while part := await reader.read(1 << 16):
                    content += part
                ended = True
            finally:
                sending.cancel()
    except ConnectionError:
        ended = True
    except TimeoutError:
        pass
    finally:
        if writer:
            writer.transport.abort()
    status = int(content[9:12]) if content[:7] == b"HTTP/1." and content[9:12].isdigit() else None
    return Outcome(status, time.monotonic() - began, _problem(hostile, status, content, ended))


async def _send_parts(writer: asyncio.StreamWriter, parts: Sequence[bytes | float]) -> None:
    try:
        for part in parts:
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            else:
                await asyncio.sleep(part)
    except ConnectionError:  # the server has answered and closed the connection
        pass


def _problem(hostile: Hostile, status: int | None, content: bytes, ended: bool) -> str | None:
    """Return what the server did that it must not do; None if there is nothing."""
    if status is None:
        allowed = hostile.silent if ended else hostile.leaves is not None
        return None if allowed else "no answer"
    head, _, body = content.partition(b"\r\n\r\n")
    if b"\r\ncontent-length: " in head:  # other answers may follow
        body = body[: int(head.partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0])]
    if status >= 500 or status == 200 and b'"type":"server_error"' in body:
        return f"{status}: {body[:300]!r}"
    if status >= 400 and len(body) > MAX_ERROR_BYTES:
        return f"{status} with {len(body)} bytes: {body[:300]!r}"
    if status >= 400 and ended and b"application/json" in head and body and not json.loads(body)["error"]["message"]:
        return f"{status} without a message"
    return None


async def attack(kind: Kind, count: int, seed: str, port: int) -> list[Outcome]:
    """Send ``count`` requests of a kind, some at once; return what came of each."""
    rng, outcomes = random.Random(seed), []
    while len(outcomes) < count:
        batch = [kind.make(rng) for _ in range(min(kind.at_once, count - len(outcomes)))]
        outcomes += await asyncio.gather(*(send(hostile, port) for hostile in batch))
    return outcomes


async def normal_answer(port: int) -> tuple[str, float]:
    """Ask for the normal answer; return its text and the seconds that it took. AssertionError if there is none."""
    began = time.monotonic()
    async with asyncio.timeout(ANSWER_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(*post("/v1/completions", NORMAL).parts)
        content = await reader.read(-1)
        writer.close()
    head, _, body = content.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), content[:500]
    return json.loads(body)["choices"][0]["text"], time.monotonic() - began
