"""Parser of tool calls in the model's text, which Qwen2.5 writes as ``<tool_call>`` JSON ``</tool_call>``.

A block is a call when its JSON is an object with a non-empty string ``name`` and, if any, ``arguments`` that are an
object or the JSON text of one (null and an empty text are no arguments); other keys are ignored. At the end of the
answer its closing tag may be missing. Every other text is content, broken blocks included, to the letter. Blanks around
calls go with them, except one run between two pieces of content.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_jax.engine.api.json_schema import Budget, simplified
from qwen_jax.errors import UserError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_SCHEMA_BYTES = 512 << 10  # of all tools of which one has to be called
# A tag inside a JSON string is text. A line end also ends a string: JSON strings have no raw line ends, and a model
# that forgets a closing quote would otherwise hide every later call.
_OUTSIDE_STRING, _INSIDE_STRING = re.compile(r'["<]'), re.compile(r'["\\\n]')


@dataclass(frozen=True)
class ToolCall:
    """A tool call in an answer; ``arguments`` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedAnswer:
    """Content and tool calls of an answer; ``content`` is None when there is nothing but calls."""

    content: str | None
    tool_calls: tuple[ToolCall, ...]


def forced_calls(tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """Return a grammar for ``StructuredOutput`` of answers that consist of tool calls and nothing else.

    Args:
      tools: tools that may be called, as OpenAI's ``function`` objects: ``name``, and ``parameters`` as a JSON schema.
      several: whether an answer may have more than one call; else it has exactly one.
    """
    budget, left = Budget(), MAX_SCHEMA_BYTES
    compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    calls = " | ".join(f"call{number}" for number in range(len(tools)))
    one = f'"{OPEN}\\n" ({calls}) "\\n{CLOSE}"'
    rules = [f'start: one ("\\n" one)*\none: {one}' if several else f"start: {one}"]
    for number, tool in enumerate(tools):
        schema = tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        # Every schema is a JSON grammar of its own, so that references within it keep their meaning.
        kind = schema.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise UserError(f"the parameters of the tool {tool['name']!r} must be a schema of an object, not of "
                            f"{kind!r}")
        if (left := left - len(json.dumps(schema))) < 0:  # looked at before anything walks through it
            raise UserError(f"parameters of tools must have at most {MAX_SCHEMA_BYTES} bytes together: give smaller "
                            "ones")
        schema = {**simplified(schema, budget), "type": "object", "x-guidance": compact}
        schema = json.dumps(schema, ensure_ascii=False)
        begin = json.dumps('{"name": ' + json.dumps(tool["name"]) + ', "arguments": ')
        rules.append(f'call{number}: {begin} arguments{number} "}}"\narguments{number}: %json {schema}')
    return "\n".join(rules)


def new_call_id() -> str:
    """Return a new, random id for a tool call."""
    return f"call_{secrets.token_hex(12)}"


def parse_tool_calls(text: str, new_id: Callable[[], str] = new_call_id) -> ParsedAnswer:
    """Split a whole answer into its content and its tool calls."""
    stream = ToolCallStream(new_id)
    events = [*stream.feed(text), *stream.flush()]
    calls = tuple(event for event in events if isinstance(event, ToolCall))
    content = "".join(event for event in events if isinstance(event, str))
    return ParsedAnswer(None if calls and not content else content, calls)


class ToolCallStream:
    """Parser of tool calls in text that arrives in pieces. Content and calls do not depend on where the text is cut.

    Events are pieces of content (str, never empty) and whole calls, in order. Text that may turn out to be part of a
    call, and blanks that may precede a call, are held back.

    Args:
      single: whether there is one call at most; then nothing that follows it is an event.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id, single: bool = False) -> None:
        self._new_id, self._single, self._called = new_id, single, False
        self._text = ""  # held back; begins with OPEN when in a block
        self._scanned = 0  # characters of a block's text already looked at; 0 outside a block
        self._in_string = False
        self._blanks = ""  # held back, before _text
        self._after_call = False  # no content since the last call
        self._events: list[str | ToolCall] = []

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take the next piece of the answer's text; return the content and the calls that are certain by now."""
        self._text += text
        while self._read_block() if self._scanned else self._find_block():
            pass
        return self._take_events()

    def flush(self) -> list[str | ToolCall]:
        """Return the last events at the end of the answer: text that was held back is no call, or one without a tag."""
        if self._scanned and (call := _call(self._text[len(OPEN):])):  # the model ended before the closing tag
            self._text, self._after_call = "", True
            self._events.append(ToolCall(self._new_id(), *call))
        self._content(self._text)
        if not self._after_call and self._blanks:
            self._events.append(self._blanks)
        self._text = self._blanks = ""
        return self._take_events()

    def _take_events(self) -> list[str | ToolCall]:
        events, self._events = self._events, []
        if not self._single:
            return events
        if self._called:
            return []
        first = next((place for place, event in enumerate(events) if isinstance(event, ToolCall)), None)
        self._called = first is not None
        return events[: first + 1] if self._called else events

    def _find_block(self) -> bool:
        """Emit the content up to the next ``<tool_call>``; return whether there is one."""
        at = self._text.find(OPEN)
        if at < 0:
            self._pass_content(len(self._text) - _tag_begun(self._text))
            return False
        self._begin_block(at)
        return True

    def _read_block(self) -> bool:
        """Look for the ``</tool_call>`` of the block that has begun; return whether it was found."""
        while found := (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(self._text, self._scanned):
            at, rest = found.start(), len(self._text) - found.start()
            self._scanned = at + 1
            if found[0] == "\\":
                if rest == 1:
                    self._scanned = at  # the escaped character has not arrived
                    return False
                self._scanned += self._text[at + 1] != "\n"
            elif found[0] != "<":
                self._in_string = not self._in_string
            elif self._text.startswith(CLOSE, at):
                self._end_block(at + len(CLOSE))
                return True
            elif self._text.startswith(OPEN, at):  # the block before was never closed
                self._begin_block(at)
            elif any(tag.startswith(self._text[at:]) for tag in (OPEN, CLOSE)):
                self._scanned = at
                return False
        self._scanned = len(self._text)
        return False

    def _begin_block(self, at: int) -> None:
        self._pass_content(at)
        self._scanned = len(OPEN)

    def _end_block(self, end: int) -> None:
        call = _call(self._text[len(OPEN) : end - len(CLOSE)])
        self._scanned = 0
        if call is None:
            self._pass_content(end)
            return
        self._text, self._after_call = self._text[end:], True
        self._events.append(ToolCall(self._new_id(), *call))

    def _pass_content(self, end: int) -> None:
        self._content(self._text[:end])
        self._text = self._text[end:]

    def _content(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            self._blanks += text
            return
        piece = self._blanks + body
        if self._events and isinstance(self._events[-1], str):
            self._events[-1] += piece
        else:
            self._events.append(piece)
        self._blanks, self._after_call = text[len(body) :], False


def _tag_begun(text: str) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of ``<tool_call>``."""
    return next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if text.endswith(OPEN[:n])), 0)


def _call(body: str) -> tuple[str, str] | None:
    """Return (name, arguments) from the JSON text between the tags; None when it is no valid tool call."""
    try:
        block = _loads(body)
        name, arguments = block["name"], block.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        if isinstance(arguments, str):
            values, text = _loads(arguments), arguments
        else:
            values, text = arguments, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + text).encode()  # JSON may spell half a surrogate pair, which no reply can carry
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (name, text) if name and isinstance(values, dict) else None


def _loads(text: str):
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")
