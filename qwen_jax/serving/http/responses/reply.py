"""Answers in the form of OpenAI's Responses protocol: one JSON object, or the events of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_jax.serving.http.openai_objects import Reply, named_event, new_id
from qwen_jax.serving.http.responses.protocol import Messages, ResponsesRequest, with_call
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Piece

FROM_BODY = ("instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p", "store")


class ResponseReply(Reply):
    """The response to one Responses request, built from parts of the answer.

    Args:
      model: name of the model that the response shows.
      body: the request, of which the response repeats options.
      tools: whether calls are looked for in the text.

    Attributes:
      output: items of the answer so far: a message, and calls of functions.
    """

    def __init__(self, model: str, body: ResponsesRequest, tools: bool) -> None:
        super().__init__(model, chat=True, count=1, tools=tools, logprobs=False,
                         single_call=body.parallel_tool_calls is False)
        self.id, self._body = new_id("resp_"), body
        self.output: list[dict[str, Any]] = []
        self._writes = False  # whether the last item is a message that may go on
        self._number = -1  # of the last event

    def add(self, piece: Piece, first: int = 0) -> Iterator[dict[str, Any]]:
        """Append a new part of the answer; yield the events of a stream that show it."""
        text, calls = self.take(piece, first)
        if text:
            if not self._writes:
                yield from self._begin_message()
            item = self.output[-1]
            item["content"][0]["text"] += text
            yield self._about_text("response.output_text.delta", item, delta=text, logprobs=[])
        for call in calls:
            yield from self._end_message()
            yield from self._call(call.id, call.name, call.arguments)
        if piece.finish_reason:
            yield from self._end_message()

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the first events of a stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._object_as("in_progress"))

    def end(self, usage: bool) -> bytes:
        """Return the last event of a stream, which has the whole response."""
        whole = self.whole()
        return self.event(self._event(f"response.{whole['status']}", response=whole))

    def failed(self, error: ApiError) -> bytes:
        """Return the event of an error in the middle of a stream."""
        reason = {"code": error.code or "server_error", "message": error.message}
        return self.event(self._event("response.failed", response={**self._object_as("failed"), "error": reason}))

    event = staticmethod(named_event)

    def whole(self) -> dict[str, Any]:
        """Return the complete response as one JSON object."""
        return self._object_as("incomplete" if self.choices[0].finish_reason == "length" else "completed")

    @property
    def usage(self) -> dict[str, Any]:
        tokens = self.choices[0].tokens
        return {"input_tokens": self.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": tokens, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.prompt_tokens + tokens}

    def messages(self) -> Messages:
        """Return the answer as messages of a chat, which a later request may go on with."""
        messages: Messages = []
        for item in self.output:
            if item["type"] == "message":
                messages.append({"role": "assistant", "content": item["content"][0]["text"]})
            else:
                messages = with_call(messages, item["call_id"], item["name"], item["arguments"])
        return messages

    def _object_as(self, status: str) -> dict[str, Any]:
        body = self._body
        choice = body.tool_choice or "auto"
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model, "output": list(self.output), **{name: getattr(body, name) for name in FROM_BODY},
            "metadata": body.metadata or {}, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": {"format": body.text and body.text.format or {"type": "text"}},
            "tools": [tool.model_dump() for tool in body.tools or ()], "truncation": "disabled",
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "reasoning": {"effort": None, "summary": None},
            "usage": None if status == "in_progress" else self.usage}

    def _begin_message(self) -> Iterator[dict[str, Any]]:
        item = {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield self._added(item)
        item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        self._writes = True
        yield self._about_text("response.content_part.added", item, part=dict(item["content"][0]))

    def _end_message(self) -> Iterator[dict[str, Any]]:
        """Yield the events that end the message that was begun."""
        if not self._writes:
            return
        self._writes, item = False, self.output[-1]
        part = item["content"][0]
        item["status"] = "completed"
        yield self._about_text("response.output_text.done", item, text=part["text"], logprobs=[])
        yield self._about_text("response.content_part.done", item, part=part)
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _call(self, call_id: str, name: str, arguments: str) -> Iterator[dict[str, Any]]:
        item = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress", "call_id": call_id, "name": name,
                "arguments": ""}
        yield self._added(dict(item))
        where = {"item_id": item["id"], "output_index": len(self.output) - 1}
        item |= {"arguments": arguments, "status": "completed"}
        self.output[-1] = item
        yield self._event("response.function_call_arguments.delta", **where, delta=arguments)
        yield self._event("response.function_call_arguments.done", **where, name=name, arguments=arguments)
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        self.output.append(item)
        return self._event("response.output_item.added", output_index=len(self.output) - 1, item=dict(item))

    def _about_text(self, kind: str, item: dict[str, Any], **values: Any) -> dict[str, Any]:
        return self._event(kind, item_id=item["id"], output_index=len(self.output) - 1, content_index=0, **values)

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **values}
