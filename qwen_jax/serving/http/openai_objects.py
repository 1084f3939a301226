"""Answers of the model in OpenAI's response format: one JSON object, or the chunks of a stream."""

from __future__ import annotations

import codecs
import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import msgspec
from msgspec.structs import replace

from qwen_jax.serving.http.tool_calls import ToolCall, ToolCallStream
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Piece, TokenLogprob

VERSION = version("qwen-jax")
ID_BYTES = 12
DONE = b"data: [DONE]\n\n"
# How the JSON text of `Reply.whole` begins: kind of the id, kind of the object.
_BEGIN = re.compile(rb'\{"id":"(chatcmpl-|cmpl-)[0-9a-f]{%d}","object":("[a-z_.]+"),"created":\d+' % (2 * ID_BYTES))


@dataclass
class Choice:
    """Single answer (OpenAI's "choice") of a response, as far as the engine has generated it.

    Attributes:
      index: number of the answer in the response.
      tools: parser of tool calls; None when the request has no tools.
      text: text so far, without tool calls; after that of the prompt, where the response repeats it.
      logprobs: log-probabilities so far, as `Piece.logprobs` has them.
      offsets: place in the text of each token with a log-probability, in characters.
      calls: tool calls so far.
      finish_reason: why the answer ended; None before.
      tokens: number of generated tokens, known at the end.
    """

    index: int
    tools: ToolCallStream | None = None
    text: str = ""
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0
    _decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"), repr=False)
    _offset: int = 0

    def note_logprobs(self, logprobs: Sequence[list[TokenLogprob]]) -> None:
        """Append the log-probabilities of further tokens of the text."""
        for token, *top in logprobs:
            self.logprobs.append([token, *top])
            self.offsets.append(self._offset)
            try:
                self._offset += len(self._decoder.decode(token.utf8))
            except UnicodeDecodeError:
                self._decoder.reset()
                self._offset += 1  # as the replacement character in the text

    def add(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        """Append a new part of the answer; return the text and the tool calls that it adds."""
        self.note_logprobs(piece.logprobs or ())
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
            called = self.calls and piece.finish_reason == "stop"  # an answer that was cut is not complete
            self.finish_reason = "tool_calls" if called else piece.finish_reason
            self.tokens = piece.tokens
        return text, calls


class Reply:
    """The response to one HTTP request, built from parts of answers, as one JSON object or as chunks of a stream.

    Args:
      model: name of the model that the response shows.
      chat: whether it is a chat completion; else it is a completion.
      count: number of answers to all prompts together.
      tools: whether tool calls are looked for in the text.
      logprobs: whether the response has log-probabilities.
      single_call: whether an answer has one tool call at most.
      only_prompt: whether the response repeats prompts without any tokens after them.

    Attributes:
      choices: the answers.
      prompt_tokens: number of tokens of the prompts whose answers have ended.
      weight_version: version of the weights that computed the last piece.
      times: `Piece.times` of the answer that ended last.
    """

    def __init__(self, model: str, *, chat: bool, count: int, tools: bool, logprobs: bool, single_call: bool = False,
                 only_prompt: bool = False) -> None:
        self.id = new_id("chatcmpl-" if chat else "cmpl-")
        self.created, self.model, self._chat, self._logprobs = int(time.time()), model, chat, logprobs
        self._only_prompt = only_prompt
        self.choices = [Choice(index, ToolCallStream(single=single_call) if tools else None) for index in range(count)]
        self.prompt_tokens = 0
        self.weight_version = 0
        self.times: tuple[float | None, ...] = ()

    def add(self, piece: Piece, first: int = 0) -> Iterator[dict[str, Any]]:
        """Append a new part of an answer; yield the stream chunks that show it, as JSON objects.

        Args:
          first: index in the response of the first answer to the same prompt.
        """
        choice = self.choices[first + piece.index]
        before = len(choice.logprobs)
        text, calls = self.take(piece, first)
        if self._chat:
            yield from self._chat_chunks(choice, piece, text, calls)
        elif text or piece.finish_reason or piece.logprobs:
            shown = self._completion_logprobs(choice, before) if self._logprobs else None
            yield self._object("text_completion", [{"index": choice.index, "text": text, "logprobs": shown,
                                                    "finish_reason": choice.finish_reason}])

    def take(self, piece: Piece, first: int) -> tuple[str, list[ToolCall]]:
        """Append a new part of an answer; return the text and the tool calls that it adds."""
        choice = self.choices[first + piece.index]
        if self._only_prompt:
            piece = replace(piece, text="", logprobs=None, tokens=0, finish_reason=piece.finish_reason and "length")
        repeated = piece.prompt_text or ""
        choice.text += repeated
        choice.note_logprobs(piece.prompt or ())
        text, calls = choice.add(piece)
        self.weight_version = piece.weight_version
        if piece.finish_reason:
            self.times = piece.times
            if piece.index == 0:
                self.prompt_tokens += piece.prompt_tokens
        return repeated + text, calls

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the first chunk of each answer in a chat's stream, which has the role and no text."""
        for choice in self.choices if self._chat else ():
            yield self._object("chat.completion.chunk", [{
                "index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                "finish_reason": None}])

    def end(self, usage: bool) -> bytes:
        """Return the end of a stream, before it the numbers of tokens if ``usage`` is set."""
        return (self.event(self._last()) if usage else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        """Return the end of a stream that an error ends."""
        return self.event(error.body) + DONE

    @staticmethod
    def event(value: dict[str, Any]) -> bytes:
        """Return a chunk of a stream as a server-sent event."""
        return b"data: " + msgspec.json.encode(value) + b"\n\n"

    def _chat_chunks(self, choice: Choice, piece: Piece, text: str, calls: list[ToolCall]) -> Iterator[dict[str, Any]]:
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = len(choice.calls) - len(calls)
            delta["tool_calls"] = [{"index": first + at, **_call(call)} for at, call in enumerate(calls)]
        if delta or piece.finish_reason or piece.logprobs:
            shown = self._chat_logprobs(piece.logprobs or ()) if self._logprobs else None
            yield self._object("chat.completion.chunk", [{"index": choice.index, "delta": delta, "logprobs": shown,
                                                          "finish_reason": choice.finish_reason}])

    def _last(self) -> dict[str, Any]:
        """Return the last chunk of a stream, which has the numbers of tokens (``usage``)."""
        return {**self._object("chat.completion.chunk" if self._chat else "text_completion", []), "usage": self.usage}

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens, as the response has them."""
        return self._counts

    @property
    def _counts(self) -> dict[str, int]:
        tokens = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens,
                "total_tokens": self.prompt_tokens + tokens}

    @property
    def details(self) -> dict[str, Any]:
        """Model, token counts, finish reasons and times of the response, for logs and traces.

        Times are seconds from the request's arrival.
        """
        details = {"model": self.model, "weight_version": self.weight_version, **self._counts,
                 "finish_reasons": [choice.finish_reason for choice in self.choices]}
        if self.times:
            arrived, *moments = self.times
            names = "queue_seconds", "first_token_seconds", "engine_seconds"
            details |= {name: round(at - arrived, 6) for name, at in zip(names, moments, strict=True) if at is not None}
        return details

    def whole(self) -> dict[str, Any]:
        """Return the complete response as one JSON object."""
        choices = []
        for choice in self.choices:
            answer: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": None}
            if self._chat:
                answer["message"] = {"role": "assistant", "content": choice.text or (None if choice.calls else "")}
                if choice.calls:
                    answer["message"]["tool_calls"] = [_call(call) for call in choice.calls]
            else:
                answer["text"] = choice.text
            if self._logprobs:
                answer["logprobs"] = (self._chat_logprobs(choice.logprobs) if self._chat
                                      else self._completion_logprobs(choice, 0))
            choices.append(answer)
        return {**self._object("chat.completion" if self._chat else "text_completion", choices), "usage": self.usage}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": fingerprint(self.weight_version), "choices": choices}

    @staticmethod
    def _chat_logprobs(logprobs: Sequence[Sequence[TokenLogprob]]) -> dict[str, Any]:
        return {"content": [{**_logprob(token), "top_logprobs": list(map(_logprob, top))}
                            for token, *top in logprobs], "refusal": None}

    @staticmethod
    def _completion_logprobs(choice: Choice, first: int) -> dict[str, Any]:
        """Return the log-probabilities of an answer's tokens from the ``first`` on; null for a prompt's first one."""
        logprobs = choice.logprobs[first:]
        return {"tokens": [_name(token) for token, *_ in logprobs],
                "token_logprobs": [None if math.isnan(token.logprob) else token.logprob for token, *_ in logprobs],
                "top_logprobs": [None if math.isnan(token.logprob) else _by_name(top) for token, *top in logprobs],
                "text_offset": choice.offsets[first:]}


def named_event(value: dict[str, Any]) -> bytes:
    """Return an object as a server-sent event that is named by the object's type."""
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), msgspec.json.encode(value))


def new_id(prefix: str) -> str:
    """Return a new, random id, with a prefix that says of what: "chatcmpl-", "cmpl-", "resp_", "msg_", "fc_"."""
    return f"{prefix}{secrets.token_hex(ID_BYTES)}"


def renewed(body: bytes) -> bytes:
    """Return the JSON text of a whole response with an id and a time of its own; any other text as it is."""
    if not (begin := _BEGIN.match(body)):
        return body
    return b'{"id":"%b","object":%b,"created":%d' % (new_id(begin[1].decode()).encode(), begin[2], time.time()) + body[
        begin.end():]


def fingerprint(weight_version: int) -> str:
    """Return OpenAI's ``system_fingerprint``: this package's version and that of the weights."""
    return f"qwen-jax-{VERSION}-w{weight_version}"


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _name(token), "logprob": token.logprob, "bytes": list(token.utf8)}


def _name(token: TokenLogprob) -> str:
    """Return a token's text; for part of a character its bytes, as OpenAI writes them, and without a text its id."""
    try:
        return token.utf8.decode() or f"token_id:{token.id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.utf8)


def _by_name(tokens: Sequence[TokenLogprob]) -> dict[str, float]:
    """Return the log-probabilities of different tokens by their names; by its id where a name occurs again."""
    values: dict[str, float] = {}
    for token in tokens:
        name = _name(token)
        values[f"token_id:{token.id}" if name in values else name] = token.logprob
    return values


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
