"""HTTP connections of a server, whose requests have a largest size outside of their bodies, a time, and no crowd."""

from __future__ import annotations

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qwen_jax.serving.http.limits import HEADERS_TOO_LARGE, MAX_HEADER_BYTES
from qwen_jax.serving.ipc.errors import ApiError

MAX_BYTES = 2 * MAX_HEADER_BYTES  # with what is between the headers
MAX_PIPELINED = 16  # requests of a connection that wait for the answer to the one before them
HEADER_SECONDS = 20  # for a request's address and headers to arrive
BODY_SECONDS = 300  # for its body
_BODY = msgspec.json.encode(ApiError(431, HEADERS_TOO_LARGE).body)
_REFUSAL = (b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY))


class Connection(HttpToolsProtocol):
    """A connection that is closed when it sends too much that is not of a body, too slowly, or too many requests.

    uvicorn and httptools have no such limits. They keep all of a request's address, headers and trailers in memory, and
    begin to handle the request after them; a connection that sends nothing is kept; and requests that follow each other
    without a pause all wait in memory. The middleware `Limits` refuses less than `MAX_BYTES` exactly.
    """

    _not_body = 0  # bytes that have arrived since the last part of a body, or since the end of a request's headers
    _late: asyncio.TimerHandle | None = None  # closes the connection unless the request has arrived before

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_within(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_within(None)
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._not_body += len(data)
        if self._late is None and self._answered:
            self._expect_within(HEADER_SECONDS)
        super().data_received(data)
        if self._not_body > MAX_BYTES and not self.transport.is_closing():
            if self._answered:  # else another response is being sent
                self.transport.write(_REFUSAL)
            self.transport.close()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.close()
            raise OverflowError(f"more than {MAX_PIPELINED} requests wait on a connection")  # ends the parsing
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._not_body = 0
        self._expect_within(BODY_SECONDS)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._not_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._not_body = 0
        self._expect_within(None)
        super().on_message_complete()

    @property
    def _answered(self) -> bool:
        """True while no request of this connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_within(self, seconds: float | None) -> None:
        """Close the connection after some seconds unless this is called again before; never with None."""
        if self._late:
            self._late.cancel()
        self._late = None if seconds is None else self.loop.call_later(seconds, self.transport.close)
