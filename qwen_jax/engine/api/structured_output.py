"""Form that an answer must have, as callers give it, validated. No JAX here, and not the grammar library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_jax.errors import UserError


@dataclass(frozen=True)
class StructuredOutput:
    """Form that an answer must have; exactly one field is set. Hashable.

    Attributes:
      json_schema: a JSON schema, as a mapping or JSON text; kept as JSON text, properties in the order given.
      regex: regular expression for the whole answer (Rust's syntax: no look-around, no back-references).
      choice: strings of which the answer is one.
      json_object: whether the answer is any JSON object.
      grammar: a Lark grammar, in llguidance's dialect.

    Raises:
      UserError: no field or several are set, or a value of the wrong kind. Errors in a grammar itself are found by
        ``GrammarCompiler.matcher``.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    json_object: bool = False
    grammar: str | None = None

    def __post_init__(self):
        if not isinstance(self.json_object, bool):
            raise UserError(f"json_object must be true or false, not {self.json_object!r}")
        given = [name for name in _FIELDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise UserError(f"structured output takes exactly one of {', '.join(_FIELDS)}, "
                            f"not {' and '.join(given) or 'none'}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            if isinstance(self.choice, str) or not isinstance(self.choice, Sequence) or not self.choice:
                raise UserError(f"choice must be a non-empty list of strings, not {self.choice!r}")
            object.__setattr__(self, "choice", tuple(_text("choice", option) for option in self.choice))
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(name for name in _FIELDS if getattr(self, name) not in (None, False))


_FIELDS = tuple(StructuredOutput.__dataclass_fields__)


def from_response_format(value: Mapping[str, Any] | None) -> StructuredOutput | None:
    """Make a `StructuredOutput` from OpenAI's ``response_format``; None for plain text. ``strict`` changes nothing.

    An object of type "json_object" may have a ``schema``, as llama.cpp's and Together's servers take it.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object" and value.get("schema"):
        return StructuredOutput(json_schema=value["schema"])
    if kind == "json_object":
        return StructuredOutput(json_object=True)
    if kind != "json_schema":
        raise UserError("response_format must be an object whose type is 'text', 'json_object' or 'json_schema'")
    inner = value.get("json_schema")
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise UserError("response_format of type 'json_schema' needs json_schema.schema")
    return StructuredOutput(json_schema=inner["schema"])


def from_guided(options: Mapping[str, Any]) -> StructuredOutput | None:
    """Make a `StructuredOutput` from vLLM's options for it; None when none is set. UserError for other names.

    They are ``json``, ``regex``, ``choice``, ``grammar`` and ``json_object``, with or without ``guided_`` before them.
    """
    names = {"json": "json_schema", **{name: name for name in ("regex", "choice", "grammar", "json_object")}}
    fields: dict[str, Any] = {}
    for key, value in options.items():
        name = names.get(key.removeprefix("guided_"))
        if name is None:
            raise UserError(f"unknown structured output option {key!r}: use {', '.join(names)}")
        if value in (None, False):
            continue
        if name in fields:
            raise UserError(f"structured output option {key!r} is given twice")
        fields[name] = value
    return StructuredOutput(**fields) if fields else None


def _schema_text(schema: Any) -> str:
    """Return a JSON schema, a mapping or JSON text, as checked JSON text."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"json_schema is not valid JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise UserError(f"json_schema must be a JSON object, not {type(value).__name__}")
    return _text("json_schema", text)


def _text(name: str, value: Any) -> str:
    """Return the value of field ``name`` if it is a non-empty string with a UTF-8 encoding, else raise UserError."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} must be a non-empty string, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} holds half of a UTF-16 surrogate pair, which is no character") from None
    return value
