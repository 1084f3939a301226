"""HTTP connections of a server, whose addresses, headers and trailers have a largest size."""

from __future__ import annotations

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qwen_jax.serving.http.limits import HEADERS_TOO_LARGE, MAX_HEADER_BYTES
from qwen_jax.serving.ipc.errors import ApiError

MAX_BYTES = 2 * MAX_HEADER_BYTES  # with what is between the headers
_BODY = msgspec.json.encode(ApiError(431, HEADERS_TOO_LARGE).body)
_REFUSAL = (b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY))


class Connection(HttpToolsProtocol):
    """A connection that is closed when it sends more than `MAX_BYTES` that are not of a body.

    uvicorn and httptools have no such limit: they keep all of a request's address, headers and trailers in memory, and
    begin to handle the request after them. The middleware `Limits` refuses less than this exactly.
    """

    _not_body = 0  # bytes that have arrived since the last part of a body, or since the end of a request's headers

    def data_received(self, data: bytes) -> None:
        self._not_body += len(data)
        super().data_received(data)
        if self._not_body > MAX_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:  # else another response is being sent
                self.transport.write(_REFUSAL)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._not_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._not_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._not_body = 0
        super().on_message_complete()
