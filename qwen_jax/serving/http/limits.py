"""ASGI middleware that checks the size of body and headers, and the API key, of a request before its route runs."""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.errors import ApiError

MAX_HEADER_BYTES = 16 << 10
HEADERS_TOO_LARGE = f"the request's address and headers have more than {MAX_HEADER_BYTES} bytes"
OPEN_PATHS = frozenset(("/", "/cluster", "/health", "/metrics", "/ping", "/ready"))  # probes, metrics, the page


def read_keys(path: str | None, variable: str) -> tuple[bytes, ...]:
    """Read API keys from a file, one per line, or without a file from an environment variable, separated by blanks.

    Raises:
      UserError: the file cannot be read, or has no key.
    """
    if path is None:
        return tuple(key.encode() for key in os.environ.get(variable, "").split())
    try:
        keys = tuple(line.strip().encode() for line in Path(path).read_text().splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"the file of API keys cannot be read: {error.strerror}: {path}") from error
    if not keys:
        raise UserError(f"{path} must have an API key per line, and has none")
    return keys


@dataclass(frozen=True)
class Caller:
    """Sender of a request, by the API key in its header; ``scope["caller"]`` of the request.

    Attributes:
      key: the key, valid or not; empty without one.
      admin: whether it is an admin key, with which more is allowed.
    """

    key: bytes
    admin: bool


@dataclass(frozen=True)
class Keys:
    """API keys of a port.

    Attributes:
      clients: keys of which a request needs one as ``Authorization: Bearer``; without any, every request is taken.
      admins: keys that are taken too, and with which more is allowed.
    """

    clients: tuple[bytes, ...] = ()
    admins: tuple[bytes, ...] = ()

    def caller(self, authorization: bytes) -> Caller | None:
        """Return who sends a request with this header, in a time that does not depend on it; None for an unknown key.
        """
        scheme, _, given = authorization.strip().partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else authorization.strip()
        known, admin = (any([hmac.compare_digest(given, key) for key in keys]) for keys in (self.clients, self.admins))
        return Caller(given, admin) if known or admin or not self.clients else None


class Limits:
    """ASGI middleware that refuses requests with too large a body, too many headers or no valid API key.

    Args:
      max_body_bytes: bytes of the largest body that is accepted.
    """

    def __init__(self, app: Any, keys: Keys, max_body_bytes: int) -> None:
        self._app, self._keys, self._max_body_bytes = app, keys, max_body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, read, refused = False, 0, False

        async def send_unless_refused(message):
            """Pass the app's answer on; send an error in its place if the body was too large to be read."""
            nonlocal began, refused
            if refused and began:
                return
            if read > self._max_body_bytes and not began:
                refused = True
                began = True
                await send_error(send, self._too_large(), scope["path"])
                return
            began = began or message["type"] == "http.response.start"
            await send(message)

        async def receive_within_limit():
            """Receive the next part of the request's body. ApiError when the body has become too large."""
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope)
            await self._app(scope, receive_within_limit, send_unless_refused)
        except ApiError as error:
            if began:
                raise
            await send_error(send, error, scope["path"])

    def _check(self, scope) -> None:
        """Raise ApiError if headers or declared body size are too large, or the API key is missing or unknown."""
        headers = scope["headers"]
        address = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if sum(len(name) + len(value) for name, value in headers) + address > MAX_HEADER_BYTES:
            raise ApiError(431, HEADERS_TOO_LARGE)
        by_name = dict(headers)
        length = by_name.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        # Anthropic's clients have a header of their own.
        scope["caller"] = self._keys.caller(by_name.get(b"authorization") or by_name.get(b"x-api-key", b""))
        if scope["caller"] is None and scope["path"] not in OPEN_PATHS:
            raise ApiError(401, "this server needs an API key: Authorization: Bearer KEY", "invalid_api_key")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_body_bytes} bytes")


async def send_error(send, error: ApiError, path: str) -> None:
    """Answer a request for a path with an error, through the ASGI callable ``send``, and close its connection."""
    body = msgspec.json.encode(error.body_for(path))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
