"""Schemas in the keywords that the grammar library knows, against jsonschema's own reading of both forms."""

import itertools
import time

import jsonschema
import pytest

from qwen_jax.engine.api.json_schema import check_pattern, simplified
from qwen_jax.errors import UserError

VALUES = [None, True, 0, 1, 2.5, "", "a", "b", [], [1], [1, 1], {}, {"k": "a"}, {"k": "b"}, {"k": "a", "x": 1},
          {"k": 1}, {"x": 1}, {"y": "s"}, {"x": 1, "y": "s"}, {"pet": {"k": "a"}}]
A = {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}
B = {"type": "object", "properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]}
DEFINED = {"$defs": {"A": A, "B": B}}
BRANCHES = [A, B, {"type": "string"}, {"type": "integer"}, {"type": ["null", "boolean"]}, {"const": 1},
            {"enum": [1.0, 2]}, {"type": "number"}, {"anyOf": [A, {"type": "null"}]},
            {"allOf": [B, {"maxProperties": 3}]}, {"properties": {"k": {"const": "a"}}, "required": ["k"]}, True, False,
            {"$ref": "#/$defs/A"},
            {"type": "object", "properties": {"x": {}}, "required": ["x"], "additionalProperties": False},
            {"type": "object", "properties": {"y": {}}, "required": ["y"], "additionalProperties": False},
            {"type": "object", "properties": {"pet": {"$ref": "#/$defs/A"}}, "required": ["pet"]},
            {"type": "object", "properties": {"pet": {"$ref": "#/$defs/B"}}, "required": ["pet"]}]


def same(schema, values=VALUES):
    """Whether both forms take the same values, and the form itself."""
    found = simplified(schema)
    forms = [jsonschema.Draft202012Validator(one) for one in (schema, found)]
    assert all(forms[0].is_valid(value) == forms[1].is_valid(value) for value in values), found
    return found


def test_branches_that_exclude_one_another_become_alternatives():
    proved = 0
    for branches in itertools.permutations(BRANCHES, 2):
        proved += "anyOf" in same({**DEFINED, "oneOf": list(branches)})
    assert proved > 150
    for one, other in ((A, B), ({"type": "string"}, {"type": "integer"}), (BRANCHES[-1], BRANCHES[-2]),
                       (BRANCHES[-3], BRANCHES[-4]), ({"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"})):
        assert "oneOf" not in same({**DEFINED, "oneOf": [one, other]})
    for one, other in ((A, A), ({"type": "integer"}, {"type": "number"}), (A, {"type": "object"}),
                       ({"const": 1}, {"enum": [1.0]}), ({"$ref": "#/$defs/A"}, {"$ref": "#/$defs/missing"})):
        assert "oneOf" in simplified({**DEFINED, "oneOf": [one, other]})


@pytest.mark.parametrize("schema", [
    {"type": "string", "format": "password"}, {"type": "array", "items": {"type": "integer"}, "uniqueItems": False},
    {"type": "object", "propertyNames": {"type": "string"}}, {"type": "object", "propertyNames": True},
    {"type": "integer", "minimum": -2**63, "maximum": 2**63 - 1}, {"type": "number", "maximum": 1.7e308},
    {"properties": {"format": {"type": "string"}, "oneOf": {"type": "array", "items": {"format": "x"}}}}])
def test_what_changes_nothing_goes_and_names_stay(schema):
    found = same(schema, [*VALUES, -1, 2**53 - 1, {"format": "a", "oneOf": ["x"]}])
    assert "password" not in str(found) and found.get("uniqueItems") is None and "propertyNames" not in found
    assert found.get("properties", {}).keys() == schema.get("properties", {}).keys()


def test_values_are_not_read_as_schemas():
    schema = {"enum": [{"format": "password", "uniqueItems": False}], "default": {"oneOf": [1]}, "minimum": 2**60}
    assert simplified(schema) == schema  # a least value is not moved down


@pytest.mark.parametrize("pattern, fine", [("^a+$", True), (r"\(?=", True), ("[(?=]", True), (r"[\](?!]", True),
                                           ("(?:a)", True), ("(?<name>a)", True),
                                           (r"([a-z]?=\d+)", True), (r"(\d?!)", True), (r"(\w?=)", True),
                                           ("(?=a)", False), ("a(?!b)", False),
                                           ("(?<=a)b", False), (r"\\(?<!a)", False)])
def test_look_around_is_found_and_nothing_else(pattern, fine):
    schema = {"properties": {"a": {"pattern": pattern}, "b": {"patternProperties": {pattern: {}}}}}
    if fine:
        assert simplified(schema) == schema
        return
    for refused in (lambda: simplified(schema), lambda: simplified(schema["properties"]["b"]),
                    lambda: check_pattern("the regex", pattern)):
        with pytest.raises(UserError, match="look-ahead or look-behind"):
            refused()


@pytest.mark.parametrize("schema", [
    {"oneOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/oneOf/0"}}]},  # a reference through it
    {"oneOf": [{"const": [1]}, {"const": [1.0]}]}, {"oneOf": [{"const": {"a": 1}}, {"const": {"a": 1.0}}]},
    {"$anchor": "b", "type": "object", "$defs": {"a": {"$anchor": "foo", "type": "string"}},
     "properties": {"x": {"oneOf": [{"$ref": "#foo"}, {"type": "string"}]}}},
    {"type": "integer", "minimum": 2**60, "maximum": 2**63}, {"minimum": 2**60}])
def test_what_is_not_certain_stays(schema):
    assert simplified(schema) == schema


@pytest.mark.parametrize("schema", [
    {"patternProperties": 5}, {"oneOf": [{"type": [{}]}, {"type": "string"}]}, {"oneOf": [{"type": 3}, {"enum": 3}]},
    {"oneOf": [{"type": "object", "required": 5}, {"type": "object", "required": [[]]}]}, {"oneOf": 3}, {"anyOf": {}},
    {"properties": []}, {"oneOf": [{"type": "object", "properties": 3, "required": ["a"]}] * 2}])
def test_schemas_that_are_none_are_left_to_the_library(schema):
    assert simplified(schema) == schema


def test_references_that_never_end():
    chain = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(600)}
    schema = {"$defs": chain, "oneOf": [{"$ref": "#/$defs/d0"}, {"type": "integer"}]}
    assert "oneOf" in simplified(schema)


def test_large_schemas_take_no_time():
    many = {"oneOf": [{"type": "object", "properties": {"k": {"enum": [[n, m] for m in range(300)]}}, "required": ["k"]}
                      for n in range(300)]}
    around = {"$defs": {"A": {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}]}}, "$ref": "#/$defs/A"}
    began = time.thread_time()
    assert "oneOf" in simplified({"allOf": [many] * 20})["allOf"][-1] and "oneOf" in simplified(around)["$defs"]["A"]
    long = [{"type": "object", "properties": {"k": {"const": "x" * 2000 + str(n)}}, "required": [str(m) for m in
                                                                                               range(4000)]}
            for n in range(100)]
    assert "oneOf" in simplified({"oneOf": long})
    check_pattern("the regex", "[" * 500_000)
    assert time.thread_time() - began < 5
