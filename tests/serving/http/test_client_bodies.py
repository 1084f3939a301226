"""What clients of 2026 send, taken from reports about comparable servers: each is understood, or refused by name."""

import json
import math
from importlib.metadata import version

import jsonschema
import pytest
from openai.types.chat import ChatCompletionMessage

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


def chat(server, **body):
    return server.post("/v1/chat/completions", {"messages": HELLO, **GREEDY, **body})


def complete(server, prompt, **body):
    return server.post("/v1/completions", {"prompt": prompt, **GREEDY, **body})


def said(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def error(response, status=400) -> dict:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_messages_as_a_client_dumps_them(server):
    """The official client's own model of an answer, and fields that it has never heard of, null."""
    answer = ChatCompletionMessage(role="assistant", content="good day").model_dump() | {"of_another_server": None}
    talk = [*HELLO, answer, {"role": "user", "content": "and now?"}]
    plain = [*HELLO, {"role": "assistant", "content": "good day"}, {"role": "user", "content": "and now?"}]
    assert said(chat(server, messages=talk)) == said(chat(server, messages=plain))
    assert said(chat(server, messages=[*HELLO, {**answer, "annotations": []}, talk[-1]])) == said(
        chat(server, messages=plain))
    assert "of_another_server" in error(chat(server, messages=[{**HELLO[0], "of_another_server": 1}]))["message"]


def test_null_is_not_given(server):
    nulls = dict.fromkeys(("functions", "function_call", "tools", "stop", "priority", "timeout", "cache_salt",
                           "continue_final_message", "logit_bias", "of_another_server"))
    assert said(chat(server, **nulls)) == said(chat(server))
    assert error(chat(server, functions=[]))["param"] == "functions"


def test_a_missing_model_is_the_only_one(server):
    assert chat(server).json()["model"] == "bundled"
    assert server.post("/score", {"prompt": "a", "continuation": "b"}).json()["model"] == "bundled"
    assert error(chat(server, model="other"), 404)["code"] == "model_not_found"


def test_models_version_and_ping(server):
    listed, = server.http.get("/v1/models").json()["data"]
    assert server.http.get("/v1/models/bundled").json() == listed and listed["max_model_len"] == 1024
    assert error(server.http.get("/v1/models/none/such"), 404)["code"] == "model_not_found"
    assert server.http.get("/version").json() == {"version": version("qwen-jax")}
    assert server.http.get("/ping").json() == server.post("/ping").json() == {"status": "ok"}


def test_a_prompt_that_is_too_long_is_named_as_openai_does(server):
    for response in (complete(server, [5] * 1024), chat(server, messages=[{"role": "user", "content": "ab " * 2000}])):
        found = error(response)
        assert found["code"] == "context_length_exceeded"
        assert found["message"].startswith("This model's maximum context length is 1024 tokens. However, the prompt ")


def test_a_chat_without_max_tokens_goes_to_the_end_of_the_context(server):
    """To what the cache of 15 pages holds: a prompt, its answer, of whose last token nothing is kept."""
    answer = server.post("/v1/chat/completions", {"messages": HELLO, "temperature": 0, "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == 15 * 64 + 1 and answer["choices"][0]["finish_reason"] == "length"
    answer = server.post("/v1/completions", {"prompt": "hello", "temperature": 0, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 256


def test_top_p_0_is_greedy_and_greedy_answers_are_equal(server):
    wanted = said(chat(server))
    assert said(chat(server, temperature=1.5, top_p=0)) == wanted
    several = chat(server, n=3).json()["choices"]
    assert [one["message"]["content"] for one in several] == [wanted] * 3


@pytest.mark.parametrize("schema", [
    {"$defs": {"Cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
               "Dog": {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}},
     "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
    {"type": "object", "properties": {"secret": {"type": "string", "format": "password", "maxLength": 3},
                                      "numbers": {"type": "array", "items": {"type": "integer", "maximum": 9},
                                                  "uniqueItems": False, "maxItems": 2}},
     "required": ["secret", "numbers"], "additionalProperties": False, "propertyNames": {"type": "string"}},
    {"type": "integer", "minimum": -2**63, "maximum": 2**63 - 1}])
def test_schemas_as_libraries_write_them(server, schema):
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    answer = chat(server, response_format=form, max_tokens=300).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["message"]["content"]), schema)


def test_a_json_object_may_have_a_schema(server):
    form = {"type": "json_object", "schema": {"const": {"a": 1}}}
    assert json.loads(said(chat(server, response_format=form, max_tokens=200))) == {"a": 1}


def test_look_ahead_is_refused_with_its_pattern(server):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!no).*$"}}}
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    assert "'^(?!no).*$' has a look-ahead" in error(chat(server, response_format=form))["message"]
    assert "'(?=a)b' has a look-ahead" in error(complete(server, "a", guided_regex="(?=a)b"))["message"]


def test_prompts_are_repeated_with_their_log_probabilities(server):
    """As lm-eval's local-completions reads them: the first null, offsets into the text, the generated token last."""
    prompt = "hello, wörld"
    tokens = server.post("/tokenize", {"prompt": prompt}).json()["tokens"]
    choice = complete(server, tokens, echo=True, logprobs=2, max_tokens=1).json()["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith(prompt) and len(found["tokens"]) == len(tokens) + 1
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert all(len(top) in (1, 2) for top in found["top_logprobs"][1:])
    score = server.post("/score", {"prompt": tokens[:1], "continuation": tokens[1:]}).json()
    assert found["token_logprobs"][1:-1] == pytest.approx(score["token_logprobs"], abs=1e-4)
    assert found["text_offset"][0] == 0 and found["text_offset"][-1] == len(prompt)
    for name, start, end in zip(found["tokens"], found["text_offset"], found["text_offset"][1:], strict=False):
        assert name.startswith("bytes:") or choice["text"][start:end] == name
    alone = complete(server, prompt, echo=True, logprobs=2, max_tokens=0).json()
    assert alone["choices"][0]["text"] == prompt and alone["usage"]["completion_tokens"] == 0
    assert alone["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(score["token_logprobs"], abs=1e-4)
    assert complete(server, prompt, echo=True).json()["choices"][0]["text"] == prompt + complete(
        server, prompt).json()["choices"][0]["text"]


def test_a_stream_repeats_its_prompt_first(server):
    body = {"prompt": "hello", "echo": True, "logprobs": 1, "stream": True, **GREEDY}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        chunks = [json.loads(line[6:])["choices"][0] for line in response.iter_lines()
                  if line.startswith("data: {")]
    whole = complete(server, "hello", echo=True, logprobs=1).json()["choices"][0]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [one for chunk in chunks for one in chunk["logprobs"][name]] == whole["logprobs"][name]


def test_repeated_prompts_are_bounded(server):
    for change in ({"logprobs": 6}, {"logprobs": 1, "prompt": ["a"] * 65}, {"logprobs": 1, "n": 65}):
        assert error(complete(server, **{"prompt": "a", "echo": True, **change}))["param"] == "echo"


def test_a_suffix_needs_a_model_for_it(server):
    assert "<|fim_prefix|>" in error(complete(server, "def f(", suffix="return 1"))["message"]
    assert error(complete(server, "a", suffix="b", echo=True))["param"] == "suffix"


def test_a_last_message_of_the_assistant_is_continued(server):
    first = said(chat(server, max_tokens=12))
    begun = {"role": "assistant", "content": first[:4]}
    rest = said(chat(server, messages=[*HELLO, begun], continue_final_message=True, add_generation_prompt=False,
                     max_tokens=6))
    tokens = server.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    begun_ids = server.post("/tokenize", {"prompt": first[:4]}).json()["tokens"]
    assert rest == complete(server, tokens + begun_ids, max_tokens=6).json()["choices"][0]["text"]
    assert error(chat(server, continue_final_message=True))["param"] == "continue_final_message"
    calling = {**begun, "tool_calls": [{"function": {"name": "find", "arguments": None}}]}
    for message in (calling, {"role": "user", "content": "a"}):
        assert error(chat(server, messages=[*HELLO, message], continue_final_message=True))["param"] == (
            "continue_final_message")
    assert error(chat(server, messages=[*HELLO, begun], continue_final_message=True, add_generation_prompt=True))[
        "param"] == "add_generation_prompt"


def test_parts_of_a_message_are_lines(server):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    joined = server.post("/tokenize", {"messages": [{"role": "user", "content": "hello\nworld"}]}).json()
    assert server.post("/tokenize", {"messages": [{"role": "user", "content": parts}]}).json() == joined


def test_stop_strings_name_control_tokens_and_wait_for_min_tokens(server):
    free = complete(server, "hello", ignore_eos=True, max_tokens=40).json()["choices"][0]["text"]
    stop = free[2:4]
    assert complete(server, "hello", ignore_eos=True, max_tokens=40, stop=stop).json()["choices"][0]["text"] == (
        free[: free.index(stop)])
    late = complete(server, "hello", ignore_eos=True, max_tokens=40, min_tokens=20, stop=stop).json()
    assert free.startswith(late["choices"][0]["text"]) and late["usage"]["completion_tokens"] >= 20
    ids = {"stop_token_ids": list(range(16)), "stop": ["<|im_end|>", "<|im_start|>"], "max_tokens": 2}
    assert complete(server, "hello", **ids).status_code == 200
    forced = {"logit_bias": {str(control_token(server)): 100}, "ignore_eos": True, "max_tokens": 5}
    ended = complete(server, "hello", stop=["<|im_start|>"], **forced).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert complete(server, "hello", **forced).json()["choices"][0]["finish_reason"] == "length"


def control_token(server) -> int:
    token, = server.post("/tokenize", {"prompt": "<|im_start|>"}).json()["tokens"]
    return token


def test_an_embedding_of_the_whole_context(server):
    body = {"input": [5] * 960}  # 15 pages, all that the cache has
    vector = server.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    assert math.isclose(sum(value * value for value in vector), 1, rel_tol=1e-3)


def tools(**parameters) -> list[dict]:
    return [{"type": "function", "function": {"name": "find", "parameters": parameters}}]


def test_a_forced_call_has_an_object_of_arguments(server):
    answer = chat(server, tools=tools(properties={"a": {"enum": [1]}}, required=["a"],
                                          additionalProperties=False), tool_choice="required",
                  parallel_tool_calls=False, max_tokens=100).json()["choices"][0]
    call, = answer["message"]["tool_calls"]
    assert call["function"]["arguments"].replace(" ", "") .startswith('{"a":1')
    assert "'find'" in error(chat(server, tools=tools(type="integer"), tool_choice="required"))["message"]


def test_a_conversation_with_broken_calls_goes_on(server):
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"a": '}}
    talk = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "name": "find", "content": "broken"},
            {"role": "system", "content": "be kind"}, {"role": "user", "content": "again"}]
    assert chat(server, messages=talk, tools=tools(type="object")).status_code == 200
