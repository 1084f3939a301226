"""docs/compatibility.md names every field of every body, and says what happens to the parameters of the clients.

Parameters that the page does not name, such as those of later clients, are refused.
"""

import re
import typing
from pathlib import Path

import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from test_routes import ask

from qwen_jax.serving.http import protocol
from qwen_jax.serving.http.anthropic.protocol import WITHOUT_EFFECT, CountRequest, MessagesRequest
from qwen_jax.serving.http.responses.protocol import ResponsesRequest

PAGE = (Path(__file__).parents[3] / "docs" / "compatibility.md").read_text()


def verdicts(text: str) -> dict[str, str]:
    """Return what the page says of each field in a part of it: "yes", "ignored" or "refused"."""
    rows = re.findall(r"^\| (`[^|]+) \| (yes|ignored|refused) \|", text, re.MULTILINE)
    return {name: verdict for names, verdict in rows for name in re.findall(r"`([^`]+)`", names)}


FIELDS, OF_RESPONSES, OF_MESSAGES = map(verdicts, re.split("## (?:Responses|Messages)\n", PAGE))
NAMED = set(re.findall(r"`(\w+)`", PAGE))
BODIES = (protocol.ChatRequest, protocol.CompletionRequest, protocol.EmbeddingRequest, protocol.ScoreRequest,
          protocol.ClassifyRequest, protocol.TokenizeRequest, protocol.DetokenizeRequest, protocol.AdapterRequest,
          CountRequest, MessagesRequest, ResponsesRequest)


@pytest.mark.parametrize("body", BODIES)
def test_every_field_of_a_body_is_named(body):
    assert body.model_fields.keys() <= NAMED


@pytest.mark.parametrize("body, parameters", [
    (protocol.ChatRequest, chat_create_params.CompletionCreateParamsBase),
    (protocol.CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    (protocol.EmbeddingRequest, embedding_create_params.EmbeddingCreateParams)])
def test_every_parameter_of_the_official_client_is_named_with_what_happens(body, parameters):
    for name in typing.get_type_hints(parameters):
        known = name in body.model_fields or name in protocol.HARMLESS
        if body is protocol.EmbeddingRequest:
            assert not known or name in NAMED, name
        elif name != "stream":
            verdict = FIELDS.get(name, "refused")
            assert known == (verdict != "refused"), name
            assert (name in protocol.HARMLESS) == (verdict == "ignored"), name


def test_every_parameter_of_a_response_is_named_with_what_happens():
    ignored = (*protocol.HARMLESS, "stream_options")
    for name in typing.get_type_hints(response_create_params.ResponseCreateParamsBase):
        known = name in ResponsesRequest.model_fields or name in protocol.HARMLESS
        verdict = OF_RESPONSES.get(name, "refused")
        assert known == (verdict != "refused"), name
        assert (name in ignored and name not in ("metadata", "store")) == (verdict == "ignored"), name


def test_every_parameter_of_anthropics_client_is_named_with_what_happens():
    for name in typing.get_type_hints(message_create_params.MessageCreateParamsBase):
        known = name in MessagesRequest.model_fields or name in WITHOUT_EFFECT
        verdict = OF_MESSAGES.get(name, "refused")
        assert known == (verdict != "refused"), name
        assert (name in WITHOUT_EFFECT) == (verdict == "ignored"), name


def test_what_is_refused_is_refused_by_name():
    messages = [{"role": "user", "content": "a"}]
    refused = [name for name, verdict in FIELDS.items() if verdict == "refused"]
    assert len(refused) > 8
    for name, answer in zip(refused, ask(*(("/v1/chat/completions", {"messages": messages, name: {}}, None)
                                           for name in refused)), strict=True):
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
