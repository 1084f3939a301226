"""StructuredOutput: accepted values, refusals and their sentences, OpenAI's and vLLM's names."""

import json

import pytest

from qwen_jax.engine.api.structured_output import StructuredOutput, from_guided, from_response_format
from qwen_jax.errors import UserError

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}

BAD_SPECS = [
    ({}, "exactly one of"),
    ({"regex": "a", "json_object": True}, "regex and json_object"),
    ({"json_object": 1}, "json_object must be"),
    ({"json_schema": "{"}, "json_schema is not valid JSON"),
    ({"json_schema": "[]"}, "must be a JSON object"),
    ({"json_schema": {"const": float("nan")}}, "json_schema is not valid JSON"),
    ({"json_schema": {"const": object()}}, "json_schema is not valid JSON"),
    ({"json_schema": {"const": "\ud800"}}, "surrogate"),
    ({"regex": ""}, "regex must be"),
    ({"regex": "\ud800"}, "surrogate"),
    ({"grammar": 3}, "grammar must be"),
    ({"choice": "yes"}, "choice must be"),
    ({"choice": []}, "choice must be"),
    ({"choice": ["yes", ""]}, "choice must be"),
]


@pytest.mark.parametrize("fields, message", BAD_SPECS, ids=range(len(BAD_SPECS)))
def test_a_bad_request_is_refused_in_one_line(fields, message):
    with pytest.raises(UserError) as error:
        StructuredOutput(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_equal_requests_are_equal_and_hashable():
    a, b = StructuredOutput(json_schema=SCHEMA), StructuredOutput(json_schema=json.dumps(SCHEMA, indent=2))
    assert a == b and hash(a) == hash(b) and a.kind == "json_schema"
    assert list(json.loads(a.json_schema)["properties"]) == ["name", "age"]  # answers come in this order
    assert hash(StructuredOutput(choice=["a"])) == hash(StructuredOutput(choice=("a",)))


def test_openai_response_format():
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    assert from_response_format(schema) == StructuredOutput(json_schema=SCHEMA)
    assert from_response_format({"type": "json_object"}) == StructuredOutput(json_object=True)
    assert from_response_format({"type": "text"}) is None and from_response_format(None) is None
    for bad in ({}, "json", {"type": "yaml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}):
        with pytest.raises(UserError, match="response_format"):
            from_response_format(bad)


def test_vllm_names():
    assert from_guided({"guided_json": SCHEMA, "guided_regex": None}) == StructuredOutput(json_schema=SCHEMA)
    assert from_guided({"choice": ["a", "b"], "json_object": False}) == StructuredOutput(choice=("a", "b"))
    assert from_guided({"guided_grammar": "start: /a/"}) == StructuredOutput(grammar="start: /a/")
    assert from_guided({}) is None and from_guided({"json_object": False, "regex": None}) is None
    for bad in ({"guided_yaml": "x"}, {"regex": "a", "guided_regex": "b"}, {"regex": "a", "choice": ["a"]}):
        with pytest.raises(UserError):
            from_guided(bad)
