"""Bodies of Anthropic's Messages routes, and the chat that each of them stands for.

https://platform.claude.com/docs/en/api/messages
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from qwen_jax.serving.http.protocol import Body, ChatRequest, Items, Part, ToolName, text_of
from qwen_jax.serving.ipc.errors import ApiError

# What tells Anthropic's servers where and how fast to work, and does not change an answer here.
WITHOUT_EFFECT = ("cache_control", "diagnostics", "inference_geo", "metadata", "service_tier", "speed",
                  "user_profile_id", "workspace_id")


class TextBlock(Part):
    """A part of a message that is text."""

    type: Literal["text"]
    text: StrictStr
    cache_control: dict[str, Any] | None = None  # pages are kept for all prompts here
    citations: list[Any] | None = None


class ToolUseBlock(Part):
    """A call of a tool in an earlier answer."""

    type: Literal["tool_use"]
    id: StrictStr
    name: StrictStr
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(Part):
    """Result of a tool's call."""

    type: Literal["tool_result"]
    tool_use_id: StrictStr
    content: StrictStr | Items[TextBlock] | None = None
    is_error: StrictBool | None = None
    cache_control: dict[str, Any] | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class InputMessage(Part):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: StrictStr | Items[Block]

    def for_chat(self) -> list[dict[str, Any]]:
        """Return the message as messages of a chat: results of tools are messages of their own, before the text."""
        blocks = [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        results = [{"role": "tool", "tool_call_id": block.tool_use_id, "content": text_of(block.content or "")}
                   for block in blocks if isinstance(block, ToolResultBlock)]
        text = text_of([block for block in blocks if isinstance(block, TextBlock)])
        calls = [{"id": block.id, "type": "function", "function": {
            "name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}
                 for block in blocks if isinstance(block, ToolUseBlock)]
        message = {"role": self.role, "content": text, **({"tool_calls": calls} if calls else {})}
        return [*results, message] if text or calls or not results else results


class Tool(Part):
    """A tool that the model may call; ``input_schema`` is a JSON schema of its arguments."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: StrictStr | None = None
    input_schema: dict[str, Any]
    strict: StrictBool | None = None
    eager_input_streaming: StrictBool | None = None  # arguments arrive at once here
    cache_control: dict[str, Any] | None = None

    def for_chat(self) -> dict[str, Any]:
        """Return the tool in OpenAI's form."""
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": self.input_schema, "strict": self.strict}}


class ToolChoice(Part):
    """Choice among tools: whether the answer has to call one, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None

    def for_chat(self) -> str | dict[str, Any]:
        """Return the choice in OpenAI's form."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name or ""}}
        return "required" if self.type == "any" else self.type


class Thinking(Part):
    """Setting of shown reasoning, which this server does not have."""

    type: Literal["disabled"]


class OutputFormat(Part):
    """Form of the answer: JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """Options of the answer."""

    format: OutputFormat | None = None


class CountRequest(Body):
    """Fields of ``POST /v1/messages/count_tokens``: the prompt and the tools."""

    model: StrictStr | None = None
    messages: Annotated[Items[InputMessage], Field(min_length=1)]
    system: StrictStr | Items[TextBlock] | None = None
    tools: Items[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat_fields(self) -> dict[str, Any]:
        """Return the fields that this body stands for in a chat's. ApiError for an unknown field.

        A last message of the assistant is continued.
        """
        for name in self.model_extra or ():
            if name not in WITHOUT_EFFECT:
                raise ApiError(400, f"{name} is not supported", param=name)
        messages = [message for one in self.messages for message in one.for_chat()]
        if self.system:
            messages.insert(0, {"role": "system", "content": text_of(self.system)})
        fields = {"model": self.model, "messages": messages,
                  "continue_final_message": messages[-1]["role"] == "assistant",
                  "tools": [tool.for_chat() for tool in self.tools] if self.tools else None}
        if self.tool_choice and self.tools:
            fields["tool_choice"] = self.tool_choice.for_chat()
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        return fields

    def chat(self) -> ChatRequest:
        """Return the body of the chat that this one stands for."""
        return ChatRequest(**self.chat_fields())


class MessagesRequest(CountRequest):
    """Body of ``POST /v1/messages``."""

    max_tokens: Annotated[StrictInt, Field(ge=1)]
    stop_sequences: Items[StrictStr] | None = None
    stream: StrictBool | None = None
    temperature: StrictInt | StrictFloat | None = None
    top_p: StrictInt | StrictFloat | None = None
    top_k: StrictInt | None = None

    def chat_fields(self) -> dict[str, Any]:
        fields = super().chat_fields()
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields |= {name: getattr(self, name) for name in names} | {"stop": self.stop_sequences or None}
        if self.output_config and self.output_config.format:
            schema = {"name": "answer", "schema": self.output_config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields
