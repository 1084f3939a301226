"""Memory of responses, which later requests read, go on with or delete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from cachetools import LRUCache

from qwen_jax.serving.http.responses.protocol import Messages
from qwen_jax.serving.ipc.errors import ApiError

MAX_BYTES = 64 << 20  # of all responses; the ones not used for longest go first


@dataclass(frozen=True)
class Kept:
    """A response and the conversation that it ends, as JSON text.

    Attributes:
      response: the JSON object.
      conversation: messages of a chat, without instructions.
      caller: API key of the client, who alone may use it.
    """

    response: bytes
    conversation: bytes
    caller: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.response) + len(self.conversation) + 500


class ResponseStore:
    """Bounded memory of responses by id. It is lost with the process."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._kept: LRUCache[str, Kept] = LRUCache(max_bytes, lambda kept: kept.size)

    def keep(self, response: dict[str, Any], conversation: Messages, caller: bytes) -> None:
        """Keep a response, unless it is larger than the whole memory."""
        kept = Kept(msgspec.json.encode(response), msgspec.json.encode(conversation), caller)
        if kept.size <= self._kept.maxsize:
            self._kept[response["id"]] = kept

    def get(self, response_id: str, caller: bytes) -> Kept:
        """Return a response. ApiError 404 for one that is not there, or is another client's."""
        kept = self._kept.get(response_id)
        if kept is None or kept.caller != caller:
            raise ApiError(404, f"there is no response {response_id[:100]!r}: it was deleted, not stored, or replaced "
                           "by newer ones", "response_not_found")
        return kept

    def delete(self, response_id: str, caller: bytes) -> None:
        """Forget a response; errors as in `get`."""
        self.get(response_id, caller)
        del self._kept[response_id]
