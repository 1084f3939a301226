"""Limit of the answers that a server generates or queues at once."""

from __future__ import annotations

from typing import Any

from qwen_jax.serving.ipc.errors import ApiError


class OpenAnswers:
    """The answers that run or wait, each of a prompt's ``n`` answers counted, of which there is a largest number.

    Args:
      limit: largest number of answers that are open at once.

    Attributes:
      count: number of answers that are open.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self._counts: dict[Any, int] = {}

    def check(self, answers: int) -> None:
        """Raise ApiError unless a request for ``answers`` answers has room: 400 if it never has, 429 if not now."""
        if answers > self.limit:
            raise ApiError(400, f"the answers to a request, prompts times n, must be at most {self.limit} "
                           f"(--max-requests), not {answers}: ask for fewer, or raise it")
        if self.count + answers > self.limit:
            raise ApiError(429, f"{self.count} requests are queued or running: try again later", retry_after=1)

    def add(self, request: Any, answers: int) -> None:
        """Count the answers of a request until `remove`. ApiError, as for `check`, without room for them."""
        self.check(answers)
        self._counts[request] = answers
        self.count += answers

    def remove(self, request: Any) -> None:
        """No longer count a request's answers, if they are counted."""
        self.count -= self._counts.pop(request, 0)
