"""The response cache in front of a server's routes. Plain ASGI, inside of what checks keys and sizes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from qwen_jax.cluster.response_cache import ResponseCache, Unshared, cacheable, key_of
from qwen_jax.errors import UserError
from qwen_jax.serving.replies import gone
from qwen_jax.serving.service import Service

KINDS = {"/v1/completions": "completion", "/v1/chat/completions": "chat", "/score": "score", "/classify": "classify",
         "/v1/embeddings": "embeddings"}
IRRELEVANT = ("user", "metadata", "priority", "timeout", "store", "service_tier", "safety_identifier",
              "prompt_cache_key")
_decode = msgspec.json.Decoder().decode


class Cached:
    """Middleware. A request with one answer is answered from the cache, or once for all who ask meanwhile.

    What it keeps is the whole body of an answer with status 200 that the weights of its key have computed; clients are
    told which way it came by ``X-Cache``. Other answers, streams, and what may differ each time pass through.
    """

    def __init__(self, app: Any, service: Service, cache: ResponseCache, identity: Any) -> None:
        self._app, self._service, self._cache, self._identity = app, service, cache, identity

    async def __call__(self, scope, receive, send) -> None:
        kind = KINDS.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if kind is None or self._service.draining or self._service.varies() is None:
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        key = None if body is None else self._key(kind, body, dict(scope["headers"]))
        if key is None:
            await self._app(scope, _again(body, receive), send)
            return
        computed = False

        async def compute() -> bytes:
            nonlocal computed
            computed = True
            return await self._computed(scope, body)

        watching = asyncio.ensure_future(gone(receive))
        asking = asyncio.ensure_future(self._cache.get_or_compute(key, compute))
        try:
            await asyncio.wait((watching, asking), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return  # the client has left
            value = asking.result()
        finally:
            watching.cancel()
            asking.cancel()
        if not computed:
            scope["route"] = SimpleNamespace(path=scope["path"])
            scope["details"]["cached"] = True
        await _send(send, value, b"miss" if computed else b"hit")

    def _key(self, kind: str, body: bytes, headers: dict[bytes, bytes]) -> bytes | None:
        """None for what is not to be cached, bad requests among it."""
        try:
            options = _decode(body)
            if not isinstance(options, dict) or options.get("stream") or not cacheable(kind, options):
                return None
            model = options.pop("model", None)
            adapter = None if model == self._service.model else self._service.adapters[model]
            for name in IRRELEVANT:
                options.pop(name, None)
            tenant = hashlib.blake2b(headers.get(b"authorization", b""), digest_size=16).hexdigest()
            return key_of(kind=kind, model=self._service.model, weight_version=self._version(),
                          adapter=adapter, prompt=None, options=options, tenant=tenant)
        except (msgspec.DecodeError, UserError, KeyError, TypeError, RecursionError):
            return None  # the route says what is wrong

    def _version(self) -> list[Any]:
        return [self._identity, self._service.weights, self._service.varies()]

    async def _computed(self, scope: dict[str, Any], body: bytes) -> bytes:
        number, version = self._service.weight_version, self._version()
        status, headers, parts = 0, [], []

        async def keep(message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, _again(body, _never), keep)
        found = dict(headers)
        value = msgspec.msgpack.encode((status, list(map(list, headers)), b"".join(parts)))
        same = found.get(b"x-weight-version") == str(number).encode() and version == self._version()
        return value if status == 200 and same else Unshared(value)


async def _whole(receive: Callable) -> bytes | None:
    """A request's body; None when its client left before its end."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes | None, after: Callable) -> Callable:
    """A ``receive`` that gives a body that has been read, and then what comes."""
    messages = [{"type": "http.disconnect"} if body is None else {"type": "http.request", "body": body}]

    async def receive():
        return messages.pop() if messages else await after()

    return receive


async def _never():
    await asyncio.Event().wait()


async def _send(send: Callable, value: bytes, how: bytes) -> None:
    status, headers, body = msgspec.msgpack.decode(value)
    headers = [(bytes(name), bytes(content)) for name, content in headers]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"x-cache", how)]})
    await send({"type": "http.response.body", "body": body})
