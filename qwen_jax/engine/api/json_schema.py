"""JSON schemas in the keywords that the grammar library knows: what they say stays the same. No JAX here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from qwen_jax.errors import UserError

# Formats of strings that the library follows. By the standard a format is an annotation, so any other changes nothing.
FORMATS = frozenset(("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
# Bounds that the library's expressions for ranges can hold. A bound outside is moved here: what is then allowed is
# allowed by the schema too.
LARGEST = 2**53 - 1
MAX_COMPARISONS = 2000  # of two schemas, in a document: some 10 ms
MAX_NESTED = 50  # comparisons inside one another
MAX_LISTED = 256  # values or names that a schema may list to be compared by them
MAX_LENGTH = 200  # characters of such a value
LITERALS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)", re.DOTALL)  # parts of a pattern without a group
LOOK_AROUND = re.compile(r"\(\?<?[=!]")
BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # keywords of named schemas
IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "additionalItems")
TYPES = frozenset(("null", "boolean", "number", "string", "array", "object"))


def simplified(schema: Any, budget: Budget | None = None) -> Any:
    """Return a JSON schema without what changes nothing, and with ``anyOf`` for a ``oneOf`` of exclusive branches.

    Annotations go that the library would refuse: unknown formats, ``uniqueItems: false``, ``propertyNames`` that allow
    every name. Bounds beyond `LARGEST` are narrowed to it. Raises UserError for a pattern with look-around.

    budget: comparisons that are left, where several schemas share them.
    """
    return _simplified(schema, _Comparison(schema, budget or Budget()))


def check_pattern(name: str, pattern: Any) -> None:
    """Raise UserError for a regular expression that looks ahead or behind, which a grammar cannot follow."""
    if isinstance(pattern, str) and LOOK_AROUND.search(LITERALS.sub("x", pattern)):
        raise UserError(f"{name} {pattern[:200]!r} has a look-ahead or look-behind, which no grammar can follow: write "
                        "it without (?=, (?!, (?<= and (?<!")


def _simplified(schema: Any, comparison: _Comparison) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    inner = partial(_simplified, comparison=comparison)
    found = {name: _parts(name, value, inner) for name, value in schema.items()}
    check_pattern("the pattern", found.get("pattern"))
    for pattern in _mapping(found.get("patternProperties")):
        check_pattern("the pattern", pattern)
    if found.get("format") not in (None, *FORMATS):
        del found["format"]
    if found.get("uniqueItems") is False:
        del found["uniqueItems"]
    if found.get("propertyNames") in ({}, True, {"type": "string"}):
        del found["propertyNames"]
    for name, beyond, others in (("minimum", -1, ("maximum", "exclusiveMaximum")),
                                 ("exclusiveMinimum", -1, ("maximum", "exclusiveMaximum")),
                                 ("maximum", 1, ("minimum", "exclusiveMinimum")),
                                 ("exclusiveMaximum", 1, ("minimum", "exclusiveMinimum"))):
        room = all(beyond * _number(found.get(other), -beyond) < LARGEST for other in others)
        if beyond * _number(found.get(name), 0) > LARGEST and room:
            found[name] = beyond * LARGEST
    branches = schema.get("oneOf")
    if isinstance(branches, list) and "anyOf" not in schema and comparison.may_rename and (
            comparison.all_exclusive(branches)):
        found = {"anyOf" if name == "oneOf" else name: value for name, value in found.items()}
    return found


def _parts(name: str, value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value of a keyword with all schemas in it changed."""
    if name in BY_NAME and isinstance(value, Mapping):
        return {key: change(part) for key, part in value.items()}
    if name in IN_LISTS + SINGLE and isinstance(value, list):
        return [change(part) for part in value]
    return change(value) if name in SINGLE else value


class Budget:
    """Number of comparisons that are left."""

    def __init__(self) -> None:
        self.left = MAX_COMPARISONS


class _Comparison:
    """Comparison of schemas of one document: whether it is certain that no value fits two of them.

    Args:
      root: the document, in which references are looked up.

    Attributes:
      may_rename: whether no reference leads through a ``oneOf``.
    """

    def __init__(self, root: Any, budget: Budget) -> None:
        self._root, self._budget = root, budget
        self._comparing: set[tuple[int, int]] = set()
        self._listed: dict[int, _Listed] = {}  # by the identity of schemas, which the document keeps
        self.may_rename = not any("/oneOf/" in reference for reference in _references(root))

    def all_exclusive(self, schemas: list[Any]) -> bool:
        """Return whether it is certain that no value fits two of the schemas."""
        return all(self.exclusive(one, other) for place, one in enumerate(schemas) for other in schemas[:place])

    def exclusive(self, one: Any, other: Any) -> bool:
        """Return whether it is certain that no value fits both schemas; false where that takes too long."""
        one, other = _resolved(one, self._root), _resolved(other, self._root)
        pair = id(one), id(other)
        self._budget.left -= 1
        if one is False or other is False:
            return True
        if self._budget.left < 0 or len(self._comparing) > MAX_NESTED or pair in self._comparing or (
                not isinstance(one, Mapping) or not isinstance(other, Mapping)):
            return False
        self._comparing.add(pair)
        try:
            mine, theirs = self._of(one), self._of(other)
            if mine.values is not None and theirs.values is not None and mine.values.isdisjoint(theirs.values):
                return True
            common = mine.types & theirs.types
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
        known, others = _mapping(one.get("properties")), _mapping(other.get("properties"))
        closed = other.get("additionalProperties") is False and "patternProperties" not in other
        required = self._of(other).required
        for name in self._of(one).required:
            if closed and name not in others:
                return True
            if name in required and name in known and name in others and self.exclusive(known[name], others[name]):
                return True
        return False

    def _of(self, schema: Mapping[str, Any]) -> _Listed:
        if id(schema) not in self._listed:
            self._listed[id(schema)] = _listed(schema)
        return self._listed[id(schema)]


class _Listed(NamedTuple):
    """Lists of a schema: types and values that it allows (None for values that are not listed), required names."""

    types: frozenset[str]
    values: frozenset[str] | None
    required: frozenset[str]


def _listed(schema: Mapping[str, Any]) -> _Listed:
    given = schema.get("type", list(TYPES))
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        given = TYPES  # no schema: the library says so
    types = frozenset("number" if name == "integer" else name for name in given)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    texts = None
    if isinstance(values, list) and len(values) <= MAX_LISTED:
        types &= frozenset(map(_type, values))
        found = [_text(value) for value in values]
        texts = None if None in found else frozenset(found)
    required = schema.get("required")
    names = required if isinstance(required, list) and len(required) <= MAX_LISTED else ()
    return _Listed(types, texts, frozenset(name for name in names if isinstance(name, str)))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, default: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _references(document: Any) -> Iterator[str]:
    """Yield the strings that keywords ``$ref`` of a document have."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if isinstance(reference := value.get("$ref"), str):
                yield reference
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _resolved(schema: Any, root: Any) -> Any:
    """Return the schema that a local ``$ref`` without any keyword beside it stands for; any other schema as it is."""
    for _ in range(16):
        if not isinstance(schema, Mapping) or not isinstance(reference := schema.get("$ref"), str) or (
                schema.keys() - {"$ref", "title", "description", "default"}) or (
                    reference != "#" and not reference.startswith("#/")):
            return schema
        schema = root
        for step in reference.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return schema


def _text(value: Any) -> str | None:
    """Return the JSON text of a value, the same for equal numbers; None for a long one, or one with parts."""
    if isinstance(value, dict | list) or isinstance(value, str | int) and len(str(value)) > MAX_LENGTH:
        return None
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value)


def _type(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")
