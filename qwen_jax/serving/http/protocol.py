"""Requests as clients send them: OpenAI's fields, and those that vLLM added to them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from qwen_jax.engine.api.structured_output import from_guided, from_response_format
from qwen_jax.errors import UserError
from qwen_jax.serving.http.tool_calls import forced_calls
from qwen_jax.serving.ipc.errors import ApiError

MOST_ANSWERS = 128  # n
MOST_INPUTS = 2048  # of one request, as OpenAI has it
Number = StrictInt | StrictFloat
# Fields of OpenAI's that change nothing of an answer here.
HARMLESS = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))


def _describe(schema: dict[str, Any]) -> None:
    """What `Body.check_fields` takes, in the OpenAPI schema."""
    schema["additionalProperties"] = False
    schema["properties"] |= {name: {} for name in HARMLESS}


class Body(BaseModel):
    """A JSON object. Unknown fields are refused by name: an option that does nothing would be a lie."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), json_schema_extra=_describe)

    def check_fields(self) -> None:
        for name in self.model_extra or ():
            if name == "chat_template":
                raise ApiError(400, "a chat template is the server's own: clients cannot give one", param=name)
            if name not in HARMLESS:
                raise ApiError(400, f"unknown field {name!r}", param=name)


def several(given: str | list[Any], name: str) -> list[str | list[int]]:
    """What may be a text, token ids, or a list of either, as a list. ApiError for too many, and for empty ones."""
    single = isinstance(given, str) or not given or isinstance(given[0], int)
    found = [given] if single else list(given)
    if not all(len(one) for one in found):
        raise ApiError(400, f"the {name} is empty", param=name)
    if len(found) > MOST_INPUTS:
        raise ApiError(400, f"{name} has {len(found)} items: at most {MOST_INPUTS} are taken at once", param=name)
    return found


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
        return several(self.prompt, "prompt")


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class CalledFunction(BaseModel):
    name: StrictStr
    arguments: StrictStr

    def for_template(self) -> dict[str, Any]:
        """With arguments as an object, which templates write as JSON themselves."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError as error:
            raise ApiError(400, f"the arguments of the call of {self.name!r} are not JSON: {error}",
                           param="messages") from None
        return {"name": self.name, "arguments": arguments}


class Call(BaseModel):
    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            found["tool_calls"] = [{"type": "function", "function": call.function.for_template()}
                                   for call in self.tool_calls]
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


class NamedFunction(BaseModel):
    name: StrictStr


class NamedTool(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None

    def params(self) -> dict[str, Any]:
        found = super().params()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.logprobs:
            found["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            found["max_tokens"] = self.max_completion_tokens
        if forced := self.forced():
            if "structured_output" in found:
                raise ApiError(400, "an answer that has to be a tool call cannot have a response_format or a guided "
                                    "option too", param="tool_choice")
            several = self.parallel_tool_calls is not False and self.tool_choice == "required"
            found["structured_output"] = {"grammar": forced_calls(forced, several)}
        return found

    def forced(self) -> list[dict[str, Any]]:
        """Of the tools, those of which the answer has to be a call; none when it need not be one."""
        if self.tool_choice in (None, "none", "auto"):
            return []
        functions = [tool.function.model_dump(exclude_none=True) for tool in self.tools or ()]
        if self.tool_choice != "required":
            functions = [one for one in functions if one["name"] == self.tool_choice.function.name]
        if not functions:
            raise ApiError(400, "tool_choice asks for a tool that is not among tools", param="tool_choice")
        return functions

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


class EmbeddingRequest(Scored):
    input: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: StrictBool = True

    def inputs(self) -> list[str | list[int]]:
        return several(self.input, "input")

    def check_dimensions(self, facts: dict[str, Any]) -> None:
        if self.dimensions not in (None, facts["hidden_size"]):
            raise ApiError(400, f"this model's embeddings have {facts['hidden_size']} dimensions: others are not "
                                "supported", param="dimensions")


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
