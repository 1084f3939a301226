"""HTTP responses to chats and completions: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from qwen_jax.serving.http.openai_objects import Reply
from qwen_jax.serving.http.protocol import GenerationRequest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.engine_client import Answer, pieces
from qwen_jax.serving.ipc.errors import ApiError

# For the OpenAPI schema of routes that stream.
STREAMS: dict[int | str, dict[str, Any]] = {200: {"description": "An answer, or the events of a stream.", "content": {
    "application/json": {}, "text/event-stream": {}}}}


async def respond(service: Service, body: GenerationRequest, request: Request, reply: Reply,
                  answers: list[Answer], on_end: Callable[[], None] = lambda: None) -> Response:
    """Return the HTTP response to a chat or completion: one JSON object, or a stream of server-sent events.

    A stream is not returned before its first event is there, so that an error before it has an HTTP status.

    on_end: called when the answers are complete, before the client has all of them.
    """
    watching = asyncio.ensure_future(gone(request.receive))
    try:
        if not body.stream:
            await unless(watching, _collect(reply, answers))
            on_end()
            note(request, **reply.details)
            return _json(reply.whole(), reply.weight_version)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chunks(service, request, reply, answers, usage=usage, on_end=on_end)
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
    return StreamingResponse(_prepend(first, chunks), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache", "X-Weight-Version": str(reply.weight_version)})


def note(request: Request, **details: Any) -> None:
    """Add details, such as token counts, to the request's record for logs and traces."""
    request.scope["details"].update(details)


async def _collect(reply: Reply, answers: list[Answer]) -> None:
    """Add to a reply all parts of all answers, until the last answer has ended."""
    per_prompt = len(reply.choices) // len(answers)
    for place, answer in enumerate(answers):
        async for arrived in pieces(answer):
            for piece in arrived:
                for _ in reply.add(piece, place * per_prompt):
                    pass


async def _chunks(service: Service, request: Request, reply: Reply, answers: list[Answer], *, usage: bool,
                  on_end: Callable[[], None]) -> AsyncIterator[bytes]:
    """Yield a stream's server-sent events as bytes; all events of one engine step together."""
    per_prompt = len(reply.choices) // len(answers)
    try:
        begun = False
        async with aclosing(_merged(answers)) as merged:
            async for place, arrived in merged:
                objects = [] if begun else list(reply.begin())
                begun = True
                for piece in arrived:
                    objects += reply.add(piece, place * per_prompt)
                if objects:
                    yield b"".join(map(reply.event, objects))
        on_end()
        yield reply.end(usage)
    except ApiError as error:
        if not begun:
            raise
        note(request, error=error.message)
        yield reply.failed(error)
    finally:
        note(request, **reply.details)
        for answer in answers:
            service.link.close(answer)


async def _merged(answers: list[Answer]) -> AsyncIterator[tuple[int, list]]:
    """Yield parts of the answers to several prompts as they arrive, each with the index of its prompt."""
    if len(answers) == 1:
        async with aclosing(pieces(answers[0])) as only:
            async for arrived in only:
                yield 0, arrived
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


async def _prepend(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Wait until the client has closed its connection. ``receive`` is the request's ASGI callable."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless(watching: asyncio.Future, awaitable: Any) -> Any:
    """Return an awaitable's result; ApiError 408 if the client leaves first, which ends ``watching``, a `gone` task."""
    working = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(408, "the client has closed the connection")
    finally:
        working.cancel()


def _json(value: Any, weight_version: int) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json",
                    headers={"X-Weight-Version": str(weight_version)})
