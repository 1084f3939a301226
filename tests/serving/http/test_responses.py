"""OpenAI's Responses protocol through its own client and a live server: answers are those of chats."""

import json

import openai
import pytest
from fake_engine import FakeEngine
from openai import OpenAI

from qwen_jax.serving.http.responses.store import ResponseStore
from qwen_jax.serving.ipc.errors import ApiError

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "bundled", "temperature": 0, "max_output_tokens": 12}
FIND = {"type": "function", "name": "find", "description": "finds", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}}


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def chat(server, messages, **body):
    answer = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 12, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_is_that_of_a_chat(server, client):
    wanted = chat(server, [{"role": "system", "content": "be brief"}, *HELLO])
    for given in ("hello", HELLO, [{"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "hello"}]}]):
        answer = client.responses.create(input=given, instructions="be brief", **GREEDY)
        assert answer.output_text == wanted["choices"][0]["message"]["content"]
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
            wanted["usage"]["prompt_tokens"], wanted["usage"]["completion_tokens"])
        cut = wanted["choices"][0]["finish_reason"] == "length"
        assert answer.status == ("incomplete" if cut else "completed") and answer.instructions == "be brief"
        assert (answer.incomplete_details is not None) == cut and answer.id.startswith("resp_")


def test_a_conversation_is_kept_and_gone_on_with(server, client):
    first = client.responses.create(input="hello", instructions="be brief", metadata={"k": "v"}, **GREEDY)
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(input="and now?", previous_response_id=first.id, **GREEDY)
    talk = [*HELLO, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "and now?"}]
    assert second.output_text == chat(server, talk)["choices"][0]["message"]["content"]  # without the instructions
    third = client.responses.create(input="more", previous_response_id=second.id, **GREEDY)
    talk += [{"role": "assistant", "content": second.output_text}, {"role": "user", "content": "more"}]
    assert third.usage.input_tokens == chat(server, talk)["usage"]["prompt_tokens"]
    sent_back = client.responses.create(input=[*HELLO, *(item.model_dump() for item in first.output),
                                               {"role": "user", "content": "and now?"}], **GREEDY)
    assert sent_back.output_text == second.output_text
    with pytest.raises(openai.BadRequestError, match="in the background"):
        client.responses.cancel(first.id)
    client.responses.delete(first.id)
    unkept = client.responses.create(input="hello", store=False, **GREEDY)
    for name in (first.id, unkept.id):
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel,
                     lambda name: client.responses.create(input="a", previous_response_id=name, **GREEDY)):
            with pytest.raises(openai.NotFoundError, match="there is no response"):
                call(name)


def test_a_stream_is_the_whole(client):
    form = {"format": {"type": "json_schema", "name": "it", "schema": {"const": "a long answer to hello"}}}
    options = {**GREEDY, "max_output_tokens": 100, "text": form}  # the client knows no end but a complete answer
    whole = client.responses.create(input="hello", **options)
    cut = client.responses.create(input="hello", stream=True, **GREEDY)
    assert [event.type for event in cut][-1] == "response.incomplete"
    with client.responses.stream(input="hello", **options) as stream:
        events = list(stream)
        found = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
                     "output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert found.output_text == whole.output_text and found.usage == whole.usage
    assert events[0].response.output == [] and client.responses.retrieve(found.id).output_text == whole.output_text


def test_functions_are_called_and_their_results_read(client):
    options = {**GREEDY, "max_output_tokens": 100, "tools": [FIND], "parallel_tool_calls": False}
    answer = client.responses.create(input="hello", tool_choice="required", **options)
    call, = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "find", {"a": 1})
    assert answer.status == "completed" and answer.tool_choice == "required"
    with client.responses.stream(input="hello", tool_choice={"type": "function", "name": "find"}, **options) as stream:
        kinds = [event.type for event in stream]
        streamed, = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert "response.function_call_arguments.done" in kinds and "response.output_text.delta" not in kinds
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "found"}
    went_on = client.responses.create(input=[result], previous_response_id=answer.id, **options)
    whole = client.responses.create(input=[*HELLO, call.model_dump(exclude_none=True), result], **options)
    assert went_on.output_text == whole.output_text and went_on.usage == whole.usage


def test_an_answer_of_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"const": 5}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "it", "schema": schema, "strict": True}}
    answer = client.responses.create(input="hello", text=form, **{**GREEDY, "max_output_tokens": 200})
    assert json.loads(answer.output_text) == {"a": 5} and answer.text.format.type == "json_schema"


@pytest.mark.parametrize("change, said", [
    ({"model": "none"}, "none"), ({"background": True}, "background"), ({"truncation": "auto"}, "truncation"),
    ({"reasoning": {"effort": "high"}}, "reasoning"), ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"input": []}, "input"), ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_text"),
    ({"tools": [{"type": "web_search"}]}, "tools"), ({"extra_body": {"colour": 1}}, "colour"),
    ({"input": "ab " * 3000}, "maximum context length"), ({"top_p": 7}, "top_p"),
    ({"text": {"format": {"type": "xml"}}}, "response_format"), ({"max_output_tokens": 0}, "max_output_tokens")])
def test_what_cannot_be_is_refused_by_name(client, change, said):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        client.responses.create(**{"input": "hello", **GREEDY, **change})
    assert said in error.value.body["message"]


def test_the_memory_is_bounded_and_each_client_has_its_own():
    store = ResponseStore(max_bytes=4000)
    for number in range(5):
        store.keep({"id": str(number), "text": "x" * 400}, HELLO, b"a")
    assert json.loads(store.get("4", b"a").conversation) == HELLO
    for name, caller in (("4", b"b"), ("0", b"a"), ("5", b"a")):
        with pytest.raises(ApiError) as error:
            store.get(name, caller)
        assert error.value.status == 404
    store.keep({"id": "large", "text": "x" * 5000}, HELLO, b"a")
    assert store.get("3", b"a").size < 4000, "nothing gives way to what is too large"


def test_an_error_in_the_middle_of_a_stream(monkeypatch):
    """After its first part an answer fails: the client is told, in the protocol's form, and nothing is kept."""
    from test_routes import ask

    from qwen_jax.serving.ipc.messages import Piece

    def half(self, answer):
        answer.put(Piece(0, 0, "text", [1]))
        answer.put(Piece(0, 0, error="the device is gone", kind="fault", finish_reason="error"))

    monkeypatch.setattr(FakeEngine, "_end", half)
    for path, body, event in (("/v1/responses", {"input": "a"}, "response.failed"),
                              ("/v1/messages", {"messages": HELLO, "max_tokens": 4}, "error")):
        answer, = ask((path, {**body, "stream": True}, None))
        assert answer.status_code in (200, 500)
        assert "the device is gone" in answer.text and (answer.status_code == 500 or f"event: {event}\n" in answer.text)
