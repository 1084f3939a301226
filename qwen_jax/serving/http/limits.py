"""What every request has to pass before its route: size of body and headers, and the key. Plain ASGI."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.errors import ApiError

MOST_HEADER_BYTES = 16 << 10
OPEN_PATHS = frozenset(("/", "/cluster", "/health", "/metrics", "/ready"))  # for whoever watches the process; the page


def read_keys(path: str | None, variable: str) -> tuple[bytes, ...]:
    """API keys, one per line of a file, or else separated by blanks in an environment variable. UserError for a file
    without any."""
    if path is None:
        return tuple(key.encode() for key in os.environ.get(variable, "").split())
    try:
        keys = tuple(line.strip().encode() for line in Path(path).read_text().splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"the file of API keys cannot be read: {error.strerror}: {path}") from error
    if not keys:
        raise UserError(f"there is no API key in {path}")
    return keys


class Limits:
    """Middleware. Refuses a request before anything reads its body.

    Args:
      keys: of which a request has to have one as ``Authorization: Bearer``; none for everybody.
      body_bytes: the largest body.
    """

    def __init__(self, app: Any, keys: Iterable[bytes], body_bytes: int) -> None:
        self._app, self._keys, self._body_bytes = app, tuple(keys), body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, read, refused = False, 0, False

        async def send_unless_refused(message):
            """In the place of whatever the app makes of a body that it could not read to its end."""
            nonlocal began, refused
            if refused and began:
                return
            if read > self._body_bytes and not began:
                refused = True
                began = True
                await _send_error(send, self._too_large())
                return
            began = began or message["type"] == "http.response.start"
            await send(message)

        async def receive_some():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._body_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope)
            await self._app(scope, receive_some, send_unless_refused)
        except ApiError as error:
            if began:
                raise
            await _send_error(send, error)

    def _check(self, scope) -> None:
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > MOST_HEADER_BYTES:
            raise ApiError(431, f"the headers have more than {MOST_HEADER_BYTES} bytes")
        found = dict(headers)
        length = found.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_bytes:
            raise self._too_large()
        if self._keys and scope["path"] not in OPEN_PATHS and not self._known(found.get(b"authorization", b"")):
            raise ApiError(401, "this server needs an API key: Authorization: Bearer KEY", "invalid_api_key")

    def _known(self, authorization: bytes) -> bool:
        """In a time that does not depend on the keys."""
        given = authorization.removeprefix(b"Bearer ").strip()
        return any([hmac.compare_digest(given, key) for key in self._keys])

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._body_bytes} bytes")


async def _send_error(send, error: ApiError) -> None:
    body = msgspec.json.encode(error.body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
