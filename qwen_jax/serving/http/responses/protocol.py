"""Body of OpenAI's Responses route, and the chat that it stands for.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from qwen_jax.serving.http.protocol import HARMLESS, Body, ChatRequest, Items, Part, StreamOptions, ToolName, text_of
from qwen_jax.serving.ipc.errors import ApiError

Messages = list[dict[str, Any]]


class TextContent(Part):
    """A part of a message that is text: of the user, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: StrictStr
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(Part):
    """A message of the conversation; of an answer sent back, its ``id`` and ``status`` do not matter."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Items[TextContent]
    id: StrictStr | None = None
    status: StrictStr | None = None


class CallItem(Part):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr
    id: StrictStr | None = None
    status: StrictStr | None = None


class ResultItem(Part):
    """Result of a function's call."""

    type: Literal["function_call_output"]
    call_id: StrictStr
    output: StrictStr | Items[TextContent]
    id: StrictStr | None = None
    status: StrictStr | None = None


class FunctionTool(Part):
    """A function that the model may call; ``parameters`` is a JSON schema of its arguments."""

    type: Literal["function"]
    name: ToolName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class NamedFunction(Part):
    """Value of ``tool_choice`` that names the function that the answer has to call."""

    type: Literal["function"]
    name: StrictStr


class TextOptions(Part):
    """Form of the answer's text: of type "text", "json_object" or "json_schema"."""

    format: dict[str, Any] | None = None

    def response_format(self) -> dict[str, Any] | None:
        """Return the form as chats have it, where the schema is a level deeper."""
        if self.format is None or self.format.get("type") != "json_schema":
            return self.format
        return {"type": "json_schema", "json_schema": {name: value for name, value in self.format.items()
                                                       if name != "type"}}


class NoReasoning(BaseModel):
    """Options of reasoning, none of which is set."""

    effort: Literal["none"] | None = None
    summary: None = None


class ResponsesRequest(Body):
    """Body of ``POST /v1/responses``."""

    model: StrictStr | None = None
    input: StrictStr | Annotated[Items[MessageItem | CallItem | ResultItem], Field(min_length=1)]
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: StrictInt | StrictFloat | None = None
    top_p: StrictInt | StrictFloat | None = None
    tools: Items[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None  # padding of chunks, which there is none of here
    store: StrictBool = True
    metadata: dict[str, StrictStr] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning: NoReasoning | None = None

    def chat(self, before: Messages) -> ChatRequest:
        """Return the body of the chat that this one stands for. ApiError for an unknown field.

        before: messages of the conversation that it goes on with.
        """
        for name in self.model_extra or ():
            if name not in HARMLESS:
                raise ApiError(400, f"{name} is not supported", param=name)
        choice = self.tool_choice
        fields = {
            "model": self.model, "messages": [*self.instructing(), *before, *self.messages()],
            "max_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p,
            "stream": self.stream, "stream_options": StreamOptions(include_usage=True) if self.stream else None,
            "tools": self.tools and [{"type": "function", "function": tool.model_dump(exclude={"type"})}
                                     for tool in self.tools],
            "tool_choice": {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, NamedFunction) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text and self.text.response_format()}
        return ChatRequest(**fields)

    def instructing(self) -> Messages:
        """Return the system message of this request alone, if it has one."""
        return [{"role": "system", "content": self.instructions}] if self.instructions else []

    def messages(self) -> Messages:
        """Return the input as messages of a chat: calls that follow one another, or a text, are one message."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: Messages = []
        for item in self.input:
            if isinstance(item, ResultItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
            elif isinstance(item, CallItem):
                messages = with_call(messages, item.call_id, item.name, item.arguments)
            else:
                messages.append({"role": item.role, "content": text_of(item.content)})
        return messages


def with_call(messages: Messages, call_id: str, name: str, arguments: str) -> Messages:
    """Return messages of a chat with a further call, in the assistant's last message where that is the last one."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    if not messages or messages[-1]["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": "", "tool_calls": [call]}]
    last = messages[-1]
    return [*messages[:-1], {**last, "tool_calls": [*last.get("tool_calls", ()), call]}]
