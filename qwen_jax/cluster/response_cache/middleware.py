"""The response cache in front of a server's routes. Plain ASGI, inside of what checks keys and sizes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from qwen_jax.cluster.fraud_routes import adapter_on_trial
from qwen_jax.cluster.response_cache.cache import ResponseCache, Unshared, cacheable, key_of
from qwen_jax.errors import UserError
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.streaming import gone

KINDS = {"/v1/completions": "completion", "/v1/chat/completions": "chat", "/score": "score", "/classify": "classify",
         "/v1/embeddings": "embeddings", "/fraud/screen": "fraud", "/fraud/screen/batch": "fraud batch"}
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
        if kind is None or self._service.draining or self._service.varies() is None and kind != "fraud":
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        key, version = (None, None) if body is None else self._key(kind, body, dict(scope["headers"]))
        if key is None:
            await self._app(scope, _again(body, receive), send)
            return
        if (value := self._cache.at_hand(key)) is not None:  # without a task, which costs as much as all the rest
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
        await _send(send, value, b"hit")

    def _key(self, kind: str, body: bytes, headers: dict[bytes, bytes]) -> tuple[bytes | None, Callable[[], Any]]:
        """None for what is not to be cached, bad requests among it. And which version answers it, whenever asked."""
        user = None
        version = lambda: self._version(user)  # noqa: E731
        try:
            options = _decode(body)
            if not isinstance(options, dict) or options.get("stream"):
                return None, version
            if not kind.startswith("fraud") and not cacheable(kind, options):  # nothing is drawn where fraud is judged
                return None, version
            model = options.pop("model", self._service.model if kind.startswith("fraud") else None)
            adapter = None if model == self._service.model else self._service.adapters[model]
            if kind == "fraud" and adapter is None:
                user = options.get("user") or options["account"]["number"]
            for name in IRRELEVANT:
                options.pop(name, None)
            if version() is None:
                return None, version
            tenant = hashlib.blake2b(headers.get(b"authorization", b""), digest_size=16).hexdigest()
            return key_of(kind=kind, model=self._service.model, weight_version=version(), adapter=adapter, prompt=None,
                          options=options, tenant=tenant), version
        except (msgspec.DecodeError, UserError, KeyError, TypeError, RecursionError):
            return None, version  # the route says what is wrong

    def _version(self, user: str | None) -> list[Any] | None:
        """None while that cannot be told. user: of a payment to screen, who has one version also during a trial."""
        varies = self._service.varies()
        if varies is None and user is not None:
            varies = adapter_on_trial(self._service.link, user)
        return None if varies is None else [self._identity, self._service.weights, varies]

    async def _computed(self, scope: dict[str, Any], body: bytes, version_now: Callable[[], Any]) -> bytes:
        number, version = self._service.weight_version, version_now()
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
        same = (found.get(b"x-weight-version") == str(number).encode() and version == version_now()
                and found.get(b"x-adapter") in (None, version[-1].encode()))
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
