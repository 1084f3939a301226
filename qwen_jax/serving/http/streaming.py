"""From the engine's pieces to HTTP: a whole answer, or a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from qwen_jax.serving.http.openai_objects import Reply
from qwen_jax.serving.http.protocol import Sampled
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.engine_client import Answer, pieces
from qwen_jax.serving.ipc.errors import ApiError

DONE = b"data: [DONE]\n\n"


async def answered(service: Service, body: Sampled, request: Request, reply: Reply,
                   answers: list[Answer]) -> Response:
    """The whole answer, or a stream of it, that begins once there is something: until then errors have their status."""
    watching = asyncio.ensure_future(gone(request.receive))
    try:
        if not body.stream:
            await unless(watching, _collect(reply, answers))
            note(request, **reply.details)
            return _json(reply.whole(), reply.weight_version)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chunks(service, request, reply, answers, usage)
        first = await unless(watching, anext(chunks))
    except BaseException:
        for answer in answers:
            service.link.close(answer)
        raise
    finally:
        watching.cancel()
        if not body.stream:
            for answer in answers:
                service.link.close(answer)
    return StreamingResponse(_from(first, chunks), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache", "X-Weight-Version": str(reply.weight_version)})


def note(request: Request, **details: Any) -> None:
    """For those who are told of the request at its end."""
    request.scope["details"].update(details)


async def _collect(reply: Reply, answers: list[Answer]) -> None:
    per_prompt = len(reply.choices) // len(answers)
    for place, answer in enumerate(answers):
        async for some in pieces(answer):
            for piece in some:
                for _ in reply.add(piece, place * per_prompt):
                    pass


async def _chunks(service: Service, request: Request, reply: Reply, answers: list[Answer],
                  usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; those of one step together."""
    per_prompt = len(reply.choices) // len(answers)
    try:
        begun = False
        async with aclosing(_merged(answers)) as merged:
            async for place, some in merged:
                objects = [] if begun or not reply.id.startswith("chat") else list(reply.roles())
                begun = True
                for piece in some:
                    objects += reply.add(piece, place * per_prompt)
                if objects:
                    yield b"".join(map(_event, objects))
        yield (_event(reply.last()) if usage else b"") + DONE
    except ApiError as error:
        if not begun:
            raise
        note(request, error=error.message)
        yield _event(error.body) + DONE
    finally:
        note(request, **reply.details)
        for answer in answers:
            service.link.close(answer)


async def _merged(answers: list[Answer]) -> AsyncIterator[tuple[int, list]]:
    """Pieces of several requests as they come, each with its request's place."""
    if len(answers) == 1:
        async with aclosing(pieces(answers[0])) as only:
            async for some in only:
                yield 0, some
        return
    sources = [pieces(answer) for answer in answers]
    waiting = {asyncio.ensure_future(anext(source)): place for place, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waiting.pop(task)
                try:
                    yield place, task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(sources[place]))] = place
    finally:
        for task in waiting:
            task.cancel()


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has closed the connection, of which ``receive`` is ASGI's."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless(watching: asyncio.Future, awaitable: Any) -> Any:
    """The result, unless the client leaves first."""
    working = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(408, "the client has closed the connection")
    finally:
        working.cancel()


def _event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _json(value: Any, weight_version: int) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json",
                    headers={"X-Weight-Version": str(weight_version)})
