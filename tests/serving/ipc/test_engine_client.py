"""The client of the engine's process, with a stand-in for that process."""
import asyncio
import sys
from pathlib import Path

import pytest

from qwen_jax.serving.ipc.engine_client import EngineClient, pieces
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import RequestOptions

STUB = (sys.executable, str(Path(__file__).parents[1] / "stub_worker.py"))


async def _ready() -> EngineClient:
    client = EngineClient("model", {}, 8, command=STUB)
    await client.start()
    while client.facts is None:
        await asyncio.sleep(0.01)
    return client


async def _text(client: EngineClient, answer) -> str:
    try:
        return "".join([piece.text async for some in pieces(answer) for piece in some])
    finally:
        client.close(answer)


def _request() -> RequestOptions:
    return RequestOptions(prompt="hello", params={"max_tokens": 3}, arrived=0.0, stream=True)


def test_an_exception_in_what_watches_a_request_ends_neither_it_nor_the_others(caplog):
    async def run():
        client = await _ready()
        try:
            watched, other = client.generate(_request(), 1), client.generate(_request(), 1)
            watched.watcher = lambda piece: 1 / 0
            assert await asyncio.wait_for(asyncio.gather(_text(client, watched), _text(client, other)), 20) == [
                "word word word "] * 2
            assert not client.failure
        finally:
            await client.stop()

    asyncio.run(run())
    assert caplog.text.count("is no longer watched") == 1


def test_an_exception_while_messages_are_taken_fails_the_requests_with_a_reason(monkeypatch):
    async def run():
        client = await _ready()
        try:
            monkeypatch.setattr(client, "_deliver", lambda piece: 1 / 0)
            with pytest.raises(ApiError, match="could not be handled: ZeroDivisionError"):
                await asyncio.wait_for(_text(client, client.generate(_request(), 1)), 20)
            assert client.ended.is_set()
            with pytest.raises(ApiError, match="the engine has stopped"):
                client.generate(_request(), 1)
        finally:
            await client.stop()

    asyncio.run(run())
