"""Schemas of request bodies: OpenAI's fields, and the ones that vLLM added to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from qwen_jax.engine.api.sampling_params import MAX_LOGIT_BIAS, MAX_STOP
from qwen_jax.engine.api.structured_output import StructuredOutput, from_guided, from_response_format
from qwen_jax.errors import UserError
from qwen_jax.serving.http.tool_calls import CLOSE, forced_calls
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Ready

MAX_ANSWERS = 128  # to one prompt: n
MAX_INPUTS = 2048  # of one request; the limit is OpenAI's
MAX_TOOLS = 128  # of one request; the limit is OpenAI's
MAX_ECHOED = 64  # prompts repeated with log-probabilities, each for every answer
MAX_ECHO_LOGPROBS = 5  # of the most likely tokens beside each of a prompt's
MAX_PARTS = 100  # fields of an object inside a body
Number = StrictInt | StrictFloat
ToolName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Item = TypeVar("Item")
# A list whose validation ends with its first wrong item. Errors about each of a million items take seconds, and
# gigabytes, for a body of 4 MB. Objects whose parts may be wrong are limited for the same reason.
Items = Annotated[list[Item], Field(fail_fast=True)]
# OpenAI's fields that are accepted and do not change an answer here.
HARMLESS = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))


def _describe(schema: dict[str, Any]) -> None:
    """Add to a body's OpenAPI schema the fields that are accepted without effect, and forbid any others."""
    schema["additionalProperties"] = False
    schema["properties"] |= {name: {} for name in HARMLESS}


def _without_nulls(value: Any) -> Any:
    """Return an object without the fields that are null, which means that they are not given."""
    return {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value


class Body(BaseModel):
    """Base class of request bodies, whose unknown fields are errors, since an ignored option would mislead a client.

    A field that is null counts as not given, whether it is known or not.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), json_schema_extra=_describe)
    _given = model_validator(mode="before")(_without_nulls)

    def check_fields(self) -> None:
        """Raise ApiError when the body has a field that is neither in its schema nor one of `HARMLESS`."""
        for name in self.model_extra or ():
            if name == "chat_template":
                raise ApiError(400, "a chat template is the server's own: clients cannot give one", param=name)
            if name not in HARMLESS:
                raise ApiError(400, f"unknown field {name!r}", param=name)


def as_list(given: str | list[Any], name: str) -> list[str | list[int]]:
    """Return the list of prompts in a field of a body that is a text, token ids, or a list of either.

    Args:
      given: value of the field.
      name: name of the field, for error messages.
    Raises:
      ApiError: more than `MAX_INPUTS` prompts, or an empty prompt.
    """
    single = isinstance(given, str) or not given or isinstance(given[0], int)
    prompts = [given] if single else list(given)
    if not all(len(prompt) for prompt in prompts):
        raise ApiError(400, f"the {name} is empty", param=name)
    if len(prompts) > MAX_INPUTS:
        raise ApiError(400, f"{name} has {len(prompts)} items: at most {MAX_INPUTS} are taken at once", param=name)
    return prompts


def few_parts(most: int) -> Callable[[Any], Any]:
    """Return a function that returns its argument; ValueError for an object, or an array, of more than ``most`` parts.
    """
    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"it must have at most {most} entries, not {len(value)}")
        return value

    return check


def _given_parts(value: Any) -> Any:
    return _without_nulls(few_parts(MAX_PARTS)(value))


class Part(BaseModel):
    """Base class of objects inside a body, which have no unknown fields but those that are null."""

    model_config = ConfigDict(extra="forbid")
    _given = model_validator(mode="before")(_given_parts)


class Lenient(BaseModel):
    """Base class of objects inside a body of which only the fields that are known here matter."""

    _given = model_validator(mode="before")(_without_nulls)


class StreamOptions(Lenient):
    """Options of a streamed answer: ``include_usage`` adds a last chunk with the numbers of tokens."""

    include_usage: StrictBool = False


class EngineRequest(Body):
    """Fields that the bodies of all requests for the engine have in common.

    Attributes:
      model: name of the model or of an adapter; the model without one.
      priority: number; waiting requests with the lowest one run first.
      timeout: seconds after which the request is aborted.
      cache_salt: only requests with the same text share pages of the prefix cache.
    """

    model: StrictStr | None = None
    priority: Annotated[StrictInt, Field(ge=-2**30, le=2**30)] = 0
    timeout: Annotated[Number, Field(gt=0, le=86400)] | None = None
    cache_salt: Annotated[StrictStr, Field(min_length=1, max_length=256)] | None = None


class GenerationRequest(EngineRequest):
    """Fields that the bodies of completions and chat completions have in common."""

    max_tokens: StrictInt | None = None
    min_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Annotated[StrictInt, Field(ge=-2**63, lt=2**64)] | None = None
    stop: StrictStr | Items[StrictStr] | None = None
    stop_token_ids: Items[StrictInt] | None = None
    ignore_eos: StrictBool | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(few_parts(MAX_LOGIT_BIAS))] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | StrictStr | None = None
    guided_regex: StrictStr | None = None
    guided_choice: Items[StrictStr] | None = None
    guided_grammar: StrictStr | None = None

    def params(self) -> dict[str, Any]:
        """Return the sampling options as keywords of `SamplingParams`. ApiError or UserError for a wrong value."""
        self.check_fields()
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options is for stream=true", param="stream_options")
        names = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop",
                 "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty",
                 "logit_bias")
        params = {name: value for name in names if (value := getattr(self, name)) is not None}
        if output := self.structured_output():
            params["structured_output"] = {output.kind: getattr(output, output.kind)}
        return params

    def structured_output(self) -> StructuredOutput | None:
        """Return the form that the answer must have, from ``response_format`` or ``guided_...``; None for any text."""
        guided = {name: getattr(self, name) for name in ("guided_json", "guided_regex", "guided_choice",
                                                         "guided_grammar")}
        output = from_guided({name: value for name, value in guided.items() if value is not None})
        format_output = from_response_format(self.response_format)
        if output and format_output:
            raise UserError("give response_format or a guided option, not both")
        return output or format_output


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: StrictStr | Items[StrictInt] | Items[StrictStr] | Items[Items[StrictInt]]
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: StrictInt | None = None
    allow_special_tokens: StrictBool = True

    def prompts(self) -> list[str | list[int]]:
        """Return the list of prompts. ApiError for an empty prompt, or for options that are not supported."""
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, "best_of is not supported", param="best_of")
        if self.suffix is not None and (self.echo or not isinstance(self.prompt, str)):
            raise ApiError(400, "suffix needs a prompt that is one text, and no echo", param="suffix")
        return as_list(self.prompt, "prompt")

    @property
    def only_prompt(self) -> bool:
        """True when prompts alone are wanted, with their log-probabilities: ``echo`` and no tokens."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self) -> dict[str, Any]:
        params = super().params()
        if self.logprobs is not None:
            params["logprobs"] = self.logprobs
        if self.echo and self.logprobs is not None:
            count = len(self.prompts()) * (self.n or 1)
            if self.logprobs > MAX_ECHO_LOGPROBS or count > MAX_ECHOED:
                raise ApiError(400, f"echo takes at most logprobs={MAX_ECHO_LOGPROBS} and {MAX_ECHOED} answers, not "
                               f"{self.logprobs} and {count}", param="echo")
            params["prompt_logprobs"] = self.logprobs
        if self.only_prompt:
            params["max_tokens"] = 1  # a step samples a token all the same
        return params


def text_of(content: str | list[Any]) -> str:
    """Return the text of a message's content, its parts as lines."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class TextPart(Lenient):
    """A text part of a chat message's content; other kinds, such as images, are refused."""

    type: Literal["text"]
    text: StrictStr


class CalledFunction(Lenient):
    """Name and arguments (JSON text) of a tool call in an earlier answer."""

    name: StrictStr
    arguments: StrictStr = ""

    def for_template(self) -> dict[str, Any]:
        """Return the call for a chat template: its arguments as an object, since templates write JSON themselves.

        Arguments that are not JSON, which a model may have written, are passed on as text.
        """
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = self.arguments
        return {"name": self.name, "arguments": arguments}


class Call(Lenient):
    """A tool call that the model made in an earlier answer of the conversation."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Part):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Items[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: Items[Call] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None
    annotations: list[Any] | None = None  # as answers of other servers have them; no template knows them

    def for_template(self) -> dict[str, Any]:
        """Return the message in the form that chat templates take."""
        content = text_of(self.content or "")
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        message |= {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        if self.tool_calls:
            message["tool_calls"] = [{"id": call.id, "type": "function", "function": call.function.for_template()}
                                     for call in self.tool_calls]
        return message


class Function(Part):
    """A function that the model may call; ``parameters`` is a JSON schema of its arguments."""

    name: ToolName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Part):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """Name of the function that the answer has to call, inside `NamedTool`."""

    name: StrictStr


class NamedTool(BaseModel):
    """Value of ``tool_choice`` that names the tool that the answer has to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``.

    With ``continue_final_message`` the answer goes on with the last message, which is the assistant's.
    """

    messages: Annotated[Items[Message], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    continue_final_message: StrictBool = False
    add_generation_prompt: StrictBool | None = None

    def params(self) -> dict[str, Any]:
        params = super().params()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.logprobs:
            params["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            params["max_tokens"] = self.max_completion_tokens
        if self.parallel_tool_calls is False and self.tools and self.tool_choice in (None, "auto"):
            stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
            if len(stop) < MAX_STOP:  # the answer ends with its first call, whose closing tag may be missing
                params["stop"] = [*stop, CLOSE]
        if forced := self.forced():
            if "structured_output" in params:
                raise ApiError(400, "an answer that has to be a tool call cannot have a response_format or a guided "
                                    "option too", param="tool_choice")
            many = self.parallel_tool_calls is not False and self.tool_choice == "required"
            params["structured_output"] = {"grammar": forced_calls(forced, many)}
        return params

    def forced(self) -> list[dict[str, Any]]:
        """Return the functions of which the answer has to call one; an empty list when it may be text."""
        if self.tool_choice in (None, "none", "auto"):
            return []
        functions = [tool.function.model_dump(exclude_none=True) for tool in self.tools or ()]
        if self.tool_choice != "required":
            functions = [function for function in functions if function["name"] == self.tool_choice.function.name]
        if not functions:
            raise ApiError(400, "tool_choice asks for a tool that is not among tools", param="tool_choice")
        return functions

    def conversation(self) -> dict[str, Any]:
        """Return the body's messages and tools in the form that chat templates take."""
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ApiError(400, "continue_final_message needs a last message of the assistant",
                           param="continue_final_message")
        if self.continue_final_message and self.messages[-1].tool_calls:
            raise ApiError(400, "a message with tool calls cannot be continued", param="continue_final_message")
        if self.add_generation_prompt is self.continue_final_message:
            raise ApiError(400, "add_generation_prompt must be the opposite of continue_final_message",
                           param="add_generation_prompt")
        tools = self.tools and self.tool_choice != "none"
        conversation = {"messages": [message.for_template() for message in self.messages],
                        "tools": [tool.model_dump(exclude_none=True) for tool in self.tools] if tools else None}
        return {**conversation, "continues": True} if self.continue_final_message else conversation


class PrefillRequest(EngineRequest):
    """Fields that the bodies of scores, classifications and embeddings, which generate no text, have in common."""

    stream: Literal[False] = False
    allow_special_tokens: StrictBool = True


class ScoreRequest(PrefillRequest):
    """Body of ``POST /score``: a prompt, and a continuation whose log-probability is wanted."""

    prompt: StrictStr | Items[StrictInt]
    continuation: StrictStr | Items[StrictInt]


class ClassifyRequest(PrefillRequest):
    """Body of ``POST /classify``: inputs, and the labels among which the model chooses one for each."""

    input: StrictStr | Annotated[Items[StrictStr], Field(min_length=1, max_length=256)]
    labels: Annotated[Items[StrictStr], Field(min_length=2, max_length=64)]

    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class EmbeddingRequest(PrefillRequest):
    """Body of ``POST /v1/embeddings``."""

    input: StrictStr | Items[StrictInt] | Items[StrictStr] | Items[Items[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: StrictBool = True

    def inputs(self) -> list[str | list[int]]:
        return as_list(self.input, "input")

    def check_dimensions(self, facts: Ready) -> None:
        """Raise ApiError when ``dimensions`` is given and is not the length of the model's embeddings."""
        if self.dimensions not in (None, facts.hidden_size):
            raise ApiError(400, f"this model's embeddings have {facts.hidden_size} dimensions: others are not "
                                "supported", param="dimensions")


class TokenizeRequest(Body):
    """Body of ``POST /tokenize``: either a prompt or the messages of a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[Items[Message], Field(min_length=1)] | None = None
    allow_special_tokens: StrictBool = True


class DetokenizeRequest(Body):
    """Body of ``POST /detokenize``: token ids to turn into text."""

    model: StrictStr | None = None
    tokens: Items[StrictInt]


class AdapterRequest(Body):
    """Body of the routes that load and unload a LoRA adapter; ``lora_path`` is a folder inside that of adapters."""

    lora_name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    lora_path: Annotated[StrictStr, Field(min_length=1, max_length=4096)] | None = None
