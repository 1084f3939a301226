"""Answers in the form of Anthropic's Messages protocol: one JSON object, or the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qwen_jax.serving.http.openai_objects import Reply, named_event, new_id
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Piece


class MessageReply(Reply):
    """The response to one Messages request, built from parts of the answer.

    Args:
      model: name of the model that the response shows.
      tools: whether tool calls are looked for in the text.
      single_call: whether the answer has one tool call at most.
    """

    def __init__(self, model: str, *, tools: bool, single_call: bool) -> None:
        super().__init__(model, chat=True, count=1, tools=tools, logprobs=False, single_call=single_call)
        self.id = new_id("msg_")
        self._stop: str | None = None
        self._block: str | None = None  # type of the block of content that has begun
        self._blocks = 0

    def add(self, piece: Piece, first: int = 0) -> Iterator[dict[str, Any]]:
        """Append a new part of the answer; yield the events of a stream that show it."""
        text, calls = self.take(piece, first)
        self._stop = piece.stop or self._stop
        if text:
            yield from self._begun("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text})
        for call in calls:
            yield from self._begun("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        if piece.finish_reason:
            yield from self._ended()

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the first event of a stream."""
        yield {"type": "message_start", "message": {**self._message([]), "stop_reason": None, "stop_sequence": None}}

    def end(self, usage: bool) -> bytes:
        """Return the last events of a stream, which always have the numbers of tokens."""
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop}
        return self.event({"type": "message_delta", "delta": delta, "usage": self.usage}) + self.event(
            {"type": "message_stop"})

    def failed(self, error: ApiError) -> bytes:
        """Return the event of an error in the middle of a stream."""
        return self.event(error.anthropic_body)

    event = staticmethod(named_event)

    def whole(self) -> dict[str, Any]:
        """Return the complete response as one JSON object."""
        choice, = self.choices
        content: list[dict[str, Any]] = [{"type": "text", "text": choice.text}] if choice.text else []
        content += [{"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
                    for call in choice.calls]
        return {**self._message(content), "stop_reason": self._stop_reason, "stop_sequence": self._stop}

    @property
    def usage(self) -> dict[str, int]:
        return {"input_tokens": self.prompt_tokens, "output_tokens": self.choices[0].tokens}

    @property
    def _stop_reason(self) -> str:
        reason = self.choices[0].finish_reason
        if reason == "stop" and self._stop is not None:
            return "stop_sequence"
        return {"length": "max_tokens", "tool_calls": "tool_use"}.get(reason or "", "end_turn")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
                "usage": self.usage}

    def _begun(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events that begin a block of content, unless it goes on with the text before."""
        if kind == self._block == "text":
            return
        yield from self._ended()
        self._block = kind
        yield {"type": "content_block_start", "index": self._blocks, "content_block": block}

    def _ended(self) -> Iterator[dict[str, Any]]:
        """Yield the event that ends the block of content that has begun."""
        if self._block is not None:
            yield {"type": "content_block_stop", "index": self._blocks}
            self._block, self._blocks = None, self._blocks + 1

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks, "delta": delta}
