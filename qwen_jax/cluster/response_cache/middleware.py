"""ASGI middleware that answers repeated requests from the response cache, after checks of API keys and sizes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec

from qwen_jax.cluster.response_cache.cache import ResponseCache, UncacheableAnswer, cache_key, cacheable
from qwen_jax.errors import UserError
from qwen_jax.serving.http.openai_objects import renewed
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import gone


@dataclass(frozen=True)
class CachedRoute:
    """Settings of an HTTP route whose answers are cached.

    Attributes:
      kind: kind of request, part of the key.
      deterministic: true if the same request has the same answer with any options.
      user_of: function that returns the user of a request, given its options. All requests of a user get the same
        version while a trial runs. Without this function requests pass through during trials.
    """

    kind: str
    deterministic: bool = False
    user_of: Callable[[dict[str, Any]], str] | None = None


OPENAI_ROUTES = {"/v1/completions": CachedRoute("completion"), "/v1/chat/completions": CachedRoute("chat"),
                 "/score": CachedRoute("score"), "/classify": CachedRoute("classify"),
                 "/v1/embeddings": CachedRoute("embeddings")}
IRRELEVANT_FIELDS = ("user", "metadata", "priority", "timeout", "store", "service_tier",
                     "safety_identifier", "prompt_cache_key")
_decode = msgspec.json.Decoder().decode


class Version(NamedTuple):
    """An answer's origin: a digest of contents (`EngineBackend.computes`), and the adapter's name or ""."""

    engine: str
    adapter: str


class CacheMiddleware:
    """Middleware that answers deterministic requests from the cache, and computes equal ones that arrive together once.

    An entry is the whole body of a response with status 200 that was computed by what its key names. The header
    ``X-Cache`` tells clients if it is a hit or a miss. Other responses, streams and requests that sample pass through.

    Args:
      http: digest of sources, and options, that decide what this process makes of an engine's answer.
      routes: the cached routes by path.
      adapter_for: function that returns the adapter that a user gets for the base model while a trial runs: "" for
        none, None if that cannot be told.
    """

    def __init__(self, app: Any, service: Service, cache: ResponseCache, *, http: Any,
                 routes: Mapping[str, CachedRoute], adapter_for: Callable[[str], str | None]) -> None:
        self._app, self._service, self._cache = app, service, cache
        self._http, self._routes, self._adapter_for = http, routes, adapter_for

    async def __call__(self, scope, receive, send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None or self._service.draining or self._service.varies() is None and route.user_of is None:
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        key, version = (None, None) if body is None else self._key(route, body, scope["caller"].key)
        if key is None:
            await self._app(scope, _replayed(body, receive), send)
            return
        if (value := self._cache.get_local(key)) is not None:  # without a task, which costs as much as all the rest
            await self._from_cache(scope, send, value)
            return
        computed = False

        async def compute() -> bytes:
            nonlocal computed
            computed = True
            return await self._computed(scope, body, version)

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
        if computed:
            await _send(send, value, b"miss")
        else:
            await self._from_cache(scope, send, value)

    @staticmethod
    async def _from_cache(scope: dict[str, Any], send: Callable, value: bytes) -> None:
        scope["route"] = SimpleNamespace(path=scope["path"])
        scope["details"]["cached"] = True
        await _send(send, value, b"hit", renewed)

    def _key(self, route: CachedRoute, body: bytes, caller: bytes) -> tuple[bytes | None, Callable[[], Version | None]]:
        """Return the cache key of a request, and a function that returns what would compute its answer now.

        The key is None for a request that is not cached, such as an invalid one, which the route itself refuses.
        """
        adapter = user = None
        version = lambda: self._version(adapter, user)  # noqa: E731
        try:
            options = _decode(body)
            if not isinstance(options, dict) or options.get("stream"):
                return None, version
            options = {name: value for name, value in options.items() if value is not None}  # null is not given
            if not route.deterministic and not cacheable(route.kind, options):
                return None, version
            model = options.pop("model", self._service.model)
            if model != self._service.model:
                if model not in self._service.adapters:
                    return None, version
                adapter = model
            elif route.user_of is not None:
                user = route.user_of(options)
            for name in IRRELEVANT_FIELDS:
                options.pop(name, None)
            if (now := version()) is None:
                return None, version
            tenant = hashlib.blake2b(caller, digest_size=16).hexdigest()
            return cache_key(kind=route.kind, http=self._http, model=model, engine=now.engine, adapter=now.adapter,
                             options=options, tenant=tenant), version
        except (msgspec.DecodeError, UserError, KeyError, TypeError, RecursionError):
            return None, version

    def _version(self, adapter: str | None, user: str | None) -> Version | None:
        """Return what would compute an answer now; None if that is not known, or a trial leaves it open.

        Args:
          adapter: the adapter that the request names.
          user: user of a request that names none.
        """
        if adapter is None:
            adapter = self._service.varies()
        if adapter is None and user is not None:
            adapter = self._adapter_for(user)
        engine = None if adapter is None else self._service.link.computes(adapter or None)
        return None if engine is None else Version(engine, adapter)

    async def _computed(self, scope: dict[str, Any], body: bytes, version_now: Callable[[], Version | None]) -> bytes:
        """Pass a request to its route; return the response as it is kept: status, headers and body in MessagePack."""
        number, version = self._service.weight_version, version_now()
        status, headers, parts = 0, [], []

        async def collect(message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, _replayed(body, _never), collect)
        by_name = dict(headers)
        value = msgspec.msgpack.encode((status, list(map(list, headers)), b"".join(parts)))
        same = (by_name.get(b"x-weight-version") == str(number).encode() and version == version_now()
                and by_name.get(b"x-adapter") in (None, version.adapter.encode()))
        return value if status == 200 and same else UncacheableAnswer(value)


async def _whole(receive: Callable) -> bytes | None:
    """Read a request's body; return None if its client left before the end."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replayed(body: bytes | None, after: Callable) -> Callable:
    """Return an ASGI ``receive`` that gives a body that has been read already, and then what ``after`` gives."""
    messages = [{"type": "http.disconnect"} if body is None else {"type": "http.request", "body": body}]

    async def receive():
        return messages.pop() if messages else await after()

    return receive


async def _never():
    await asyncio.Event().wait()


async def _send(send: Callable, value: bytes, origin: bytes, change: Callable[[bytes], bytes] = bytes) -> None:
    """Send a response as it is kept, its body changed. origin: value of the header ``X-Cache``."""
    status, headers, body = msgspec.msgpack.decode(value)
    headers = [(bytes(name), bytes(content)) for name, content in headers]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"x-cache", origin)]})
    await send({"type": "http.response.body", "body": change(body)})
