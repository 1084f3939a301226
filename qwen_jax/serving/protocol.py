"""Requests as clients send them: OpenAI's fields, and those that vLLM added to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from qwen_jax.engine.structured_output import from_guided, from_response_format
from qwen_jax.errors import UserError
from qwen_jax.serving.errors import ApiError

MOST_ANSWERS = 128  # n
Number = StrictInt | StrictFloat
# Fields of OpenAI's that change nothing of an answer here.
HARMLESS = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))


class Body(BaseModel):
    """A JSON object. Unknown fields are refused by name: an option that does nothing would be a lie."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def check_fields(self) -> None:
        for name in self.model_extra or ():
            if name == "chat_template":
                raise ApiError(400, "a chat template is the server's own: clients cannot give one", param=name)
            if name not in HARMLESS:
                raise ApiError(400, f"unknown field {name!r}", param=name)


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class Sampled(Body):
    """What completions and chats have in common."""

    model: StrictStr
    max_tokens: StrictInt | None = None
    min_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: Annotated[StrictInt, Field(ge=-2**63, lt=2**64)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | StrictStr | None = None
    guided_regex: StrictStr | None = None
    guided_choice: list[StrictStr] | None = None
    guided_grammar: StrictStr | None = None
    priority: Annotated[StrictInt, Field(ge=-2**30, le=2**30)] = 0
    timeout: Annotated[Number, Field(gt=0, le=86400)] | None = None

    def params(self) -> dict[str, Any]:
        """Of `SamplingParams`, as JSON; what is not given is not there. UserError, ApiError."""
        self.check_fields()
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options is for stream=true", param="stream_options")
        names = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop",
                 "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty",
                 "logit_bias")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if looks := self.looks():
            found["structured_output"] = {looks.kind: getattr(looks, looks.kind)}
        return found

    def looks(self):
        guided = {name: getattr(self, name) for name in ("guided_json", "guided_regex", "guided_choice",
                                                         "guided_grammar")}
        given = from_guided({name: value for name, value in guided.items() if value is not None})
        asked = from_response_format(self.response_format)
        if given and asked:
            raise UserError("give response_format or a guided option, not both")
        return given or asked


class CompletionRequest(Sampled):
    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: StrictInt | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several. ApiError for none, and for what is not supported."""
        if self.echo or self.suffix is not None or self.best_of not in (None, self.n or 1):
            name = "echo" if self.echo else "suffix" if self.suffix is not None else "best_of"
            raise ApiError(400, f"{name} is not supported", param=name)
        single = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        found = [self.prompt] if single else list(self.prompt)
        if not all(len(one) for one in found):
            raise ApiError(400, "the prompt is empty", param="prompt")
        return found


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            found["tool_calls"] = self.tool_calls
        return found


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None

    def params(self) -> dict[str, Any]:
        found = super().params()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.logprobs:
            found["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            found["max_tokens"] = self.max_completion_tokens
        return found

    def conversation(self) -> dict[str, Any]:
        tools = self.tools and self.tool_choice != "none"
        return {"messages": [message.for_template() for message in self.messages],
                "tools": [tool.model_dump(exclude_none=True) for tool in self.tools] if tools else None}


class Scored(Body):
    """What scores and classifications have in common."""

    model: StrictStr
    priority: Annotated[StrictInt, Field(ge=-2**30, le=2**30)] = 0
    timeout: Annotated[Number, Field(gt=0, le=86400)] | None = None
    stream: Literal[False] = False


class ScoreRequest(Scored):
    prompt: StrictStr | list[StrictInt]
    continuation: StrictStr | list[StrictInt]


class ClassifyRequest(Scored):
    input: StrictStr | Annotated[list[StrictStr], Field(min_length=1, max_length=256)]
    labels: Annotated[list[StrictStr], Field(min_length=2, max_length=64)]

    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class TokenizeRequest(Body):
    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None


class DetokenizeRequest(Body):
    model: StrictStr | None = None
    tokens: list[StrictInt]


class AdapterRequest(Body):
    lora_name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    lora_path: StrictStr | None = None
