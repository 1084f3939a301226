"""Batches of requests in a file, in OpenAI's batch format, answered by an engine without a port."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx
from fastapi import FastAPI
from tqdm import tqdm

from qwen_jax.errors import UserError
from qwen_jax.serving.http.app import Extension, create_app
from qwen_jax.serving.http.limits import Keys
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.engine_client import EngineBackend
from qwen_jax.serving.options import ServerOptions

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/score", "/classify")
MAX_OPEN = 1 << 16  # answers; `run_batch` bounds the requests
RETRY_SECONDS = 0.05  # after which a request is tried again that found too many others open


@dataclass(frozen=True)
class Line:
    """A request of a batch: the caller's name for it, its route and its body."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_batch(path: str | Path) -> list[Line]:
    """Read a batch, JSON lines with ``custom_id``, ``url`` and ``body``. UserError names the first wrong line."""
    lines: dict[str, Line] = {}
    for number, text in enumerate(_text_of(path).splitlines(), 1):
        if not text.strip():
            continue
        line = _line(text, f"{path}, line {number}")
        if line.custom_id in lines:
            raise UserError(f"{path}, line {number}: custom_id {line.custom_id!r} stands in another line too: give "
                            "each request one of its own")
        lines[line.custom_id] = line
    if not lines:
        raise UserError(f"{path} has no requests")
    return list(lines.values())


def model_of(lines: Iterable[Line]) -> str | None:
    """Return the model that the requests name; None if none does. UserError if they name several."""
    names = sorted({str(line.body["model"]) for line in lines if line.body.get("model") is not None})
    if len(names) > 1:
        raise UserError(f"a batch is for one model, and this one names {', '.join(names[:5])}: make one of each")
    return names[0] if names else None


def answered(path: str | Path) -> set[str]:
    """Return which requests a file of answers has, after cutting off a last line that was not written to its end."""
    path = Path(path)
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    try:
        found = {json.loads(line)["custom_id"] for line in data[:whole].splitlines()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of answers to a batch: name another, or remove it") from None
    if whole < len(data):
        os.truncate(path, whole)
    return found


async def run_batch(link: EngineBackend, model: str, lines: list[Line], output: TextIO, *, concurrency: int,
                    progress: bool) -> int:
    """Start an engine and append its answers to a file as they arrive, in any order; return how many are errors.

    Args:
      model: name by which requests ask for the model.
      concurrency: requests that are open at once.
      progress: whether a bar on stderr shows how many have ended.
    Raises:
      UserError: the engine refuses its options, or has stopped.
    """
    app = create_app(Service(link, model, ServerOptions(name=model)), (), Keys(), 1 << 30, Extension())
    waiting, errors = iter(lines), 0
    async with _started(link), _client(app) as http:
        with tqdm(total=len(lines), unit="request", disable=not progress, smoothing=0.02) as bar:
            async def work() -> None:
                nonlocal errors
                for line in waiting:
                    answer = await _answer(link, http, line)
                    errors += answer["response"]["status_code"] != 200
                    output.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    output.flush()
                    bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(lines))):
                        group.create_task(work())
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
    return errors


async def _answer(link: EngineBackend, http: httpx.AsyncClient, line: Line) -> dict[str, Any]:
    """Return the line of a request's answer. UserError when the engine has stopped."""
    while True:
        response = await http.post(line.url, json=line.body)
        if link.failure:
            raise UserError(f"the engine has stopped: {link.failure}; run the command again to go on")
        if response.status_code != 429:
            break
        await asyncio.sleep(RETRY_SECONDS)
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id, "error": None,
            "response": {"status_code": response.status_code, "request_id": response.headers.get("x-request-id"),
                         "body": response.json()}}


@asynccontextmanager
async def _started(link: EngineBackend) -> AsyncIterator[None]:
    """Start an engine, wait until it takes requests, and stop it when the ``async with`` block ends."""
    await link.start()
    try:
        while link.facts is None and not link.ended.is_set():
            await asyncio.sleep(RETRY_SECONDS)
        if link.refused or link.failure:
            raise UserError(link.refused or f"the engine has stopped: {link.failure}")
        yield
    finally:
        await link.stop()


def _client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None)


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _line(text: str, where: str) -> Line:
    """Return the request in a line of a batch. UserError, with ``where`` it is, for one that cannot be."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("custom_id"), str) or (
            not isinstance(given.get("body"), dict)):
        raise UserError(f"{where}: must be an object with a custom_id, a url and a body")
    if given.get("method", "POST") != "POST" or given.get("url") not in ROUTES:
        raise UserError(f"{where}: must POST to one of {', '.join(ROUTES)}, not {given.get('method', 'POST')} "
                        f"{given.get('url')}")
    if given["body"].get("stream"):
        raise UserError(f"{where}: answers of a batch are whole: leave out stream")
    return Line(given["custom_id"], given["url"], given["body"])
