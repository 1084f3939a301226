"""Exception for errors that HTTP clients get, as OpenAI's error objects."""

from __future__ import annotations

from typing import Any

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
         404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error",
         413: "invalid_request_error", 429: "rate_limit_error",
         431: "invalid_request_error", 500: "server_error", 503: "service_unavailable_error"}


MAX_TEXT = 1000  # characters of a message or of a field's name: what a client sent is not sent back whole


class ApiError(Exception):
    """An error that ends an HTTP request and is its answer.

    Args:
      status: HTTP status of the answer.
      message: one sentence for the client.
      code: OpenAI's short name for the error, if it has one.
      param: name of the request's field that is wrong.
      retry_after: seconds after which to try again, for the header ``Retry-After``.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None,
                 retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object, the body of the response."""
        return {"error": {"message": _text(self.message), "type": TYPES[self.status],
                          "param": None if self.param is None else _text(self.param), "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's error object, the body of the response of its routes."""
        kind = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}.get(self.status)
        return {"type": "error", "error": {"type": kind or TYPES[self.status], "message": _text(self.message)}}

    def body_for(self, path: str) -> dict[str, Any]:
        """Return the body of the response to a request for this path."""
        return self.anthropic_body if path.startswith("/v1/messages") else self.body

    @property
    def headers(self) -> dict[str, str]:
        """Additional headers of the response: ``Retry-After``, if the error has it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def _text(text: str) -> str:
    """Return a text as JSON can carry it, which has no half of a surrogate pair; the middle of a long one is left out.
    """
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 2]} ... {text[-MAX_TEXT // 2 :]}"
    return text.encode("utf-8", "backslashreplace").decode()
