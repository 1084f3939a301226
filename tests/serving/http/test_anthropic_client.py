"""Anthropic's own Python client talks to a live server: answers are those of chats, in its form."""

import json

import anthropic
import pytest
from anthropic import Anthropic

HELLO = [{"role": "user", "content": "hello"}]
LIMIT = {"model": "bundled", "max_tokens": 12}
GREEDY = {**LIMIT, "extra_body": {"temperature": 0}}  # which the client of 2026 has no name for
FIND = {"name": "find", "description": "finds", "input_schema": {
    "type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}}


@pytest.fixture(scope="module")
def client(server):
    return Anthropic(base_url=server.url, api_key="any", max_retries=0)


def chat(server, messages=HELLO, **body):
    answer = server.post("/v1/chat/completions", {"messages": messages, **LIMIT, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_an_answer_is_that_of_a_chat(server, client):
    wanted = chat(server)
    answer = client.messages.create(messages=HELLO, **GREEDY)
    assert [block.text for block in answer.content] == [wanted["message"]["content"]]
    assert answer.id.startswith("msg_") and answer.type == "message"
    assert (answer.role, answer.model) == ("assistant", "bundled")
    assert answer.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[wanted["finish_reason"]]
    counted = client.messages.count_tokens(model="bundled", messages=HELLO).input_tokens
    assert answer.usage.input_tokens == counted and 1 <= answer.usage.output_tokens <= 12


def test_systems_blocks_and_samplings(server, client):
    blocks = [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}},
              {"type": "text", "text": "you"}]
    answer = client.messages.create(messages=[{"role": "user", "content": blocks}], extra_body={"top_k": 1}, **LIMIT,
                                    system=[{"type": "text", "text": "be brief"}], metadata={"user_id": "u"})
    wanted = chat(server, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello\nyou"}])
    assert answer.content[0].text == wanted["message"]["content"]


def test_a_last_message_of_the_assistant_is_continued(server, client):
    begun = [*HELLO, {"role": "assistant", "content": "Good"}]
    answer = client.messages.create(messages=begun, **GREEDY)
    assert answer.content[0].text == chat(server, begun, continue_final_message=True)["message"]["content"]


def test_stop_sequences_are_named(server, client):
    text = client.messages.create(messages=HELLO, **GREEDY).content[0].text
    answer = client.messages.create(messages=HELLO, stop_sequences=["\0", text[3:5]], **GREEDY)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", text[3:5])
    assert "".join(block.text for block in answer.content) == text[: text.index(text[3:5])]


def test_a_stream_is_the_whole(client):
    whole = client.messages.create(messages=HELLO, **GREEDY)
    with client.messages.stream(messages=HELLO, **GREEDY) as stream:
        text, kinds = "".join(stream.text_stream), []
        found = stream.get_final_message()
    for event in client.messages.create(messages=HELLO, stream=True, **GREEDY):
        kinds += [event.type] if not kinds or kinds[-1] != event.type else []
    assert text == whole.content[0].text and found.usage.output_tokens == whole.usage.output_tokens
    assert ([block.text for block in found.content], found.stop_reason) == ([text], whole.stop_reason)
    assert kinds == ["message_start", "content_block_start", "content_block_delta", "content_block_stop",
                     "message_delta", "message_stop"]


def test_tools_are_called_and_their_results_read(client):
    options = {**GREEDY, "max_tokens": 100, "tools": [FIND]}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    answer = client.messages.create(messages=HELLO, tool_choice=choice, **options)
    call, = answer.content
    assert (call.type, call.name, call.input, answer.stop_reason) == ("tool_use", "find", {"a": 1}, "tool_use")
    with client.messages.stream(messages=HELLO, tool_choice={"type": "tool", "name": "find"}, **options) as stream:
        streamed, = stream.get_final_message().content
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "found"}]}
    talk = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, call.model_dump()]},
            {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]}]
    assert client.messages.create(messages=talk, **options).content
    longer = client.messages.count_tokens(model="bundled", messages=talk, tools=[FIND]).input_tokens
    assert longer > client.messages.count_tokens(model="bundled", messages=talk[:1], tools=[FIND]).input_tokens


def test_an_answer_of_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"const": 5}}, "required": ["a"], "additionalProperties": False}
    answer = client.messages.create(messages=HELLO, output_config={"format": {"type": "json_schema", "schema": schema}},
                                    **{**GREEDY, "max_tokens": 200})
    assert json.loads(answer.content[0].text) == {"a": 5}


@pytest.mark.parametrize("change, kind, said", [
    ({"model": "none"}, anthropic.NotFoundError, "none"), ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
    ({"messages": []}, anthropic.BadRequestError, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, anthropic.BadRequestError, "image"),
    ({"messages": [{"role": "user", "content": "ab " * 3000}]}, anthropic.BadRequestError, "maximum context length"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, anthropic.BadRequestError, "thinking"),
    ({"tools": [FIND], "tool_choice": {"type": "tool", "name": "other"}}, anthropic.BadRequestError, "tool_choice"),
    ({"extra_body": {"mcp_servers": [1]}}, anthropic.BadRequestError, "mcp_servers")])
def test_what_cannot_be_is_an_error_of_the_client(client, change, kind, said):
    with pytest.raises(kind) as error:
        client.messages.create(**{"messages": HELLO, **GREEDY, **change})
    body = error.value.body
    assert body["type"] == "error" and said in body["error"]["message"]
    assert body["error"]["type"] == ("not_found_error" if kind is anthropic.NotFoundError else "invalid_request_error")
