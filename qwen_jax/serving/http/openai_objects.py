"""Answers as clients read them: OpenAI's objects, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from qwen_jax.serving.http.tool_calls import ToolCall, ToolCallStream
from qwen_jax.serving.ipc.messages import Piece

VERSION = version("qwen-jax")


@dataclass
class Choice:
    """One answer so far."""

    index: int
    tools: ToolCallStream | None = None
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0

    def add(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        """What is new of its text, and of its tool calls."""
        self.logprobs += piece.logprobs or ()
        events: list[str | ToolCall] = [piece.text] if piece.text else []
        if self.tools:
            events = self.tools.feed(piece.text)
            if piece.finish_reason:
                events += self.tools.flush()
        text = "".join(event for event in events if isinstance(event, str))
        calls = [event for event in events if isinstance(event, ToolCall)]
        self.text += text
        self.calls += calls
        if piece.finish_reason:
            self.finish_reason = "tool_calls" if self.calls else piece.finish_reason
            self.tokens = piece.tokens
        return text, calls


class Reply:
    """A whole response. ``chat`` or a completion, of ``count`` answers to each of some prompts."""

    def __init__(self, model: str, chat: bool, count: int, tools: bool, logprobs: bool) -> None:
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created, self.model, self._chat, self._logprobs = int(time.time()), model, chat, logprobs
        self.choices = [Choice(index, ToolCallStream() if tools else None) for index in range(count)]
        self.prompt_tokens = 0
        self.weight_version = 0
        self.times: tuple[float | None, ...] = ()  # of the answer that ended last

    def add(self, piece: Piece, first: int = 0) -> Iterator[dict[str, Any]]:
        """The chunks for a piece of the answers from ``first`` on."""
        choice = self.choices[first + piece.index]
        text, calls = choice.add(piece)
        self.weight_version = piece.weight_version
        if piece.finish_reason:
            self.times = piece.times
            if piece.index == 0:
                self.prompt_tokens += piece.prompt_tokens
        if self._chat:
            yield from self._chat_chunks(choice, piece, text, calls)
        elif text or piece.finish_reason or piece.logprobs:
            shown = self._completion_logprobs(piece.logprobs or ()) if self._logprobs else None
            yield self._object("text_completion", [{"index": choice.index, "text": text, "logprobs": shown,
                                                    "finish_reason": choice.finish_reason}])

    def _chat_chunks(self, choice: Choice, piece: Piece, text: str, calls: list[ToolCall]) -> Iterator[dict[str, Any]]:
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = len(choice.calls) - len(calls)
            delta["tool_calls"] = [{"index": first + at, **_call(call)} for at, call in enumerate(calls)]
        if delta or piece.finish_reason or piece.logprobs:
            shown = self._chat_logprobs(piece.logprobs or ()) if self._logprobs else None
            yield self._object("chat.completion.chunk", [{"index": choice.index, "delta": delta, "logprobs": shown,
                                                          "finish_reason": choice.finish_reason}])

    def roles(self) -> Iterator[dict[str, Any]]:
        """What a chat's stream begins with."""
        for choice in self.choices:
            yield self._object("chat.completion.chunk", [{
                "index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                "finish_reason": None}])

    def last(self) -> dict[str, Any]:
        """A chunk with the usage."""
        return {**self._object("chat.completion.chunk" if self._chat else "text_completion", []), "usage": self.usage}

    @property
    def usage(self) -> dict[str, int]:
        tokens = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens,
                "total_tokens": self.prompt_tokens + tokens}

    @property
    def details(self) -> dict[str, Any]:
        """For logs and traces; seconds from the arrival."""
        found = {"model": self.model, "weight_version": self.weight_version, **self.usage,
                 "finish_reasons": [choice.finish_reason for choice in self.choices]}
        if self.times:
            arrived, *moments = self.times
            names = "queue_seconds", "first_token_seconds", "engine_seconds"
            found |= {name: round(at - arrived, 6) for name, at in zip(names, moments, strict=True) if at is not None}
        return found

    def whole(self) -> dict[str, Any]:
        """Everything at once."""
        shown = []
        for choice in self.choices:
            one: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": None}
            if self._chat:
                one["message"] = {"role": "assistant", "content": choice.text or (None if choice.calls else "")}
                if choice.calls:
                    one["message"]["tool_calls"] = [_call(call) for call in choice.calls]
            else:
                one["text"] = choice.text
            if self._logprobs:
                make = self._chat_logprobs if self._chat else self._completion_logprobs
                one["logprobs"] = make(choice.logprobs)
            shown.append(one)
        return {**self._object("chat.completion" if self._chat else "text_completion", shown), "usage": self.usage}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": fingerprint(self.weight_version), "choices": choices}

    @staticmethod
    def _chat_logprobs(logprobs) -> dict[str, Any]:
        return {"content": [{**_logprob(text, value), "top_logprobs": [_logprob(*one) for one in most]}
                            for text, value, most in logprobs], "refusal": None}

    @staticmethod
    def _completion_logprobs(logprobs) -> dict[str, Any]:
        return {"tokens": [text for text, _, _ in logprobs], "token_logprobs": [value for _, value, _ in logprobs],
                "top_logprobs": [dict(most) for _, _, most in logprobs], "text_offset": []}


def fingerprint(weight_version: int) -> str:
    return f"qwen-jax-{VERSION}-w{weight_version}"


def _logprob(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
