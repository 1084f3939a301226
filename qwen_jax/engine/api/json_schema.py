"""JSON schemas in the keywords that the grammar library knows: what they say stays the same. No JAX here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from qwen_jax.errors import UserError

# Formats of strings that the library follows. By the standard a format is an annotation, so any other changes nothing.
FORMATS = frozenset(("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
# Bounds that the library's expressions for ranges can hold. A bound outside is moved here: what is then allowed is
# allowed by the schema too.
LARGEST = 2**53 - 1
MAX_COMPARISONS = 20_000  # of two schemas or values, in a document: some 0.1 s
LITERALS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # parts of a pattern without a group
LOOK_AROUND = re.compile(r"\(\?<?[=!]")
BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # keywords of named schemas
IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "additionalItems")
TYPES = frozenset(("null", "boolean", "number", "string", "array", "object"))


def simplified(schema: Any) -> Any:
    """Return a JSON schema without what changes nothing, and with ``anyOf`` for a ``oneOf`` of exclusive branches.

    Annotations go that the library would refuse: unknown formats, ``uniqueItems: false``, ``propertyNames`` that allow
    every name. Raises UserError for a pattern with look-around.
    """
    return _simplified(schema, _Comparison(schema))


def check_pattern(name: str, pattern: Any) -> None:
    """Raise UserError for a regular expression that looks ahead or behind, which a grammar cannot follow."""
    if isinstance(pattern, str) and LOOK_AROUND.search(LITERALS.sub("", pattern)):
        raise UserError(f"{name} {pattern[:200]!r} has a look-ahead or look-behind, which no grammar can follow: write "
                        "it without (?=, (?!, (?<= and (?<!")


def _simplified(schema: Any, comparison: _Comparison) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    inner = partial(_simplified, comparison=comparison)
    found = {name: _parts(name, value, inner) for name, value in schema.items()}
    check_pattern("the pattern", found.get("pattern"))
    for pattern in found.get("patternProperties") or ():
        check_pattern("the pattern", pattern)
    if found.get("format") not in (None, *FORMATS):
        del found["format"]
    if found.get("uniqueItems") is False:
        del found["uniqueItems"]
    if found.get("propertyNames") in ({}, True, {"type": "string"}):
        del found["propertyNames"]
    for name, beyond in (("minimum", -1), ("exclusiveMinimum", -1), ("maximum", 1), ("exclusiveMaximum", 1)):
        bound = found.get(name)
        if isinstance(bound, int | float) and not isinstance(bound, bool) and bound * beyond > LARGEST:
            found[name] = beyond * LARGEST
    branches = schema.get("oneOf")
    if isinstance(branches, list) and "anyOf" not in schema and comparison.all_exclusive(branches):
        found = {"anyOf" if name == "oneOf" else name: value for name, value in found.items()}
    return found


def _parts(name: str, value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value of a keyword with all schemas in it changed."""
    if name in BY_NAME and isinstance(value, Mapping):
        return {key: change(part) for key, part in value.items()}
    if name in IN_LISTS + SINGLE and isinstance(value, list):
        return [change(part) for part in value]
    return change(value) if name in SINGLE else value


class _Comparison:
    """Comparison of schemas of one document: whether it is certain that no value fits two of them.

    Args:
      root: the document, in which references are looked up.
    """

    def __init__(self, root: Any) -> None:
        self._root, self._left = root, MAX_COMPARISONS
        self._comparing: set[tuple[int, int]] = set()

    def all_exclusive(self, schemas: list[Any]) -> bool:
        """Return whether it is certain that no value fits two of the schemas."""
        return all(self.exclusive(one, other) for place, one in enumerate(schemas) for other in schemas[:place])

    def exclusive(self, one: Any, other: Any) -> bool:
        """Return whether it is certain that no value fits both schemas; false after `MAX_COMPARISONS`."""
        one, other = _resolved(one, self._root), _resolved(other, self._root)
        pair, self._left = (id(one), id(other)), self._left - _size(one) - _size(other)
        if one is False or other is False:
            return True
        if self._left < 0 or pair in self._comparing or not isinstance(one, Mapping) or not isinstance(other, Mapping):
            return False
        self._comparing.add(pair)
        try:
            values, others = _values(one), _values(other)
            if values is not None and others is not None and not values & others:
                return True
            common = _types(one) & _types(other)
            return (not common or self._by_parts(one, other) or self._by_parts(other, one)
                    or common == {"object"} and (self._by_property(one, other) or self._by_property(other, one)))
        finally:
            self._comparing.remove(pair)

    def _by_parts(self, whole: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Return whether all alternatives of a schema, or one part of a conjunction, exclude the other schema."""
        return any(isinstance(parts := whole.get(name), list) and bool(parts)
                   and certain(self.exclusive(part, other) for part in parts)
                   for name, certain in (("anyOf", all), ("oneOf", all), ("allOf", any)))

    def _by_property(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Return whether a property that one schema of objects requires tells its objects from the other's."""
        known, others = _named(one), _named(other)
        closed = other.get("additionalProperties") is False and "patternProperties" not in other
        for name in one.get("required") or ():
            if closed and name not in others:
                return True
            both = name in (other.get("required") or ()) and name in known and name in others
            if both and self.exclusive(known[name], others[name]):
                return True
        return False


def _size(schema: Any) -> int:
    """Return how many values and names comparing a schema looks at, about."""
    if not isinstance(schema, Mapping):
        return 1
    lists = (schema.get(name) for name in ("enum", "required", "type"))
    return 1 + sum(len(values) for values in lists if isinstance(values, list))


def _named(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _resolved(schema: Any, root: Any) -> Any:
    """Return the schema that a local ``$ref`` without any keyword beside it stands for; any other schema as it is."""
    for _ in range(16):
        if not isinstance(schema, Mapping) or not isinstance(reference := schema.get("$ref"), str) or (
                schema.keys() - {"$ref", "title", "description", "default"}) or not reference.startswith("#"):
            return schema
        schema = root
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return schema


def _values(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the values that a schema lists, as JSON text; None if it lists none."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return frozenset(map(_text, values)) if isinstance(values, list) else None


def _text(value: Any) -> str:
    number = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if number else value, sort_keys=True)


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """Return the types that a schema's values may have; integers are numbers."""
    types = schema.get("type", list(TYPES))
    types = frozenset("number" if name == "integer" else name for name in
                      ([types] if isinstance(types, str) else types if isinstance(types, list) else TYPES))
    if (values := _values(schema)) is not None:
        types &= {_type(json.loads(value)) for value in values}
    return types


def _type(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")
