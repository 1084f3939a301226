"""Definitions of grammars in llguidance's notation, the limits that they have to keep, and their compilation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from qwen_jax.engine.api.json_schema import check_pattern, simplified
from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.errors import UserError

MAX_BYTES = 512 << 10
MAX_DEFINITIONS = 2000  # of a schema, or rules of a grammar
MAX_DEPTH = 100  # of a schema's brackets; the library reads no more than 128
MAX_REASON = 300  # characters; the library quotes what it refuses
# Blanks between two JSON tokens. Bounded, because a weak model may otherwise write blanks until max_tokens; 32 are a
# line end and more indentation than people read.
JSON_BLANKS = r"[ \t\n\r]{1,32}"
# Fuel bounds the time of a compilation and of a mask where the library counts it, and states bound the memory of an
# answer (about 1 kB each). A schema of 400 varied fields uses a tenth. Verbose errors would print the parser's state,
# not what is wrong with the grammar.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=20_000,
                         verbose_errors=False)
_RULE = re.compile(r"^[ \t]*+[?!]*+[A-Za-z_]\w*+[^:\"\n]{0,200}:", re.MULTILINE)  # "name:", "NAME.2:", "name{x}:"


def definition_of(spec: StructuredOutput) -> str:
    """Return the form of an answer as a grammar in llguidance's notation. UserError if it is too large."""
    kind = spec.kind
    text = "".join(spec.choice) if kind == "choice" else {"json_object": '{"type": "object"}'}.get(kind) or (
        getattr(spec, kind))
    size = len(text.encode())
    if size > MAX_BYTES:
        raise UserError(f"{kind} must have at most {MAX_BYTES} bytes, not {size}: give a smaller one")
    if kind == "regex":
        check_pattern("the regex", text)
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":  # One lexeme: rules would fill the parser's rows. Lark's strings have JSON's escapes.
        options = " | ".join(json.dumps(option, ensure_ascii=False) for option in spec.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {options}")
    if kind == "grammar":
        _check_definitions("rules of the grammar", sum(1 for _ in _RULE.finditer(text)))
        return LLMatcher.grammar_from_lark(text)
    schema = json.loads(text)
    _check_schema(schema)
    text = json.dumps(simplified(schema), ensure_ascii=False)
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": JSON_BLANKS})


def compiled(tokenizer: LLTokenizer, definition: str) -> LLMatcher:
    """Compile a grammar; return a matcher at the beginning of an answer. ValueError with the reason for a bad grammar.

    The first mask is computed here: it finds grammars without any text, and prepares data that every later mask uses.
    """
    matcher = LLMatcher(tokenizer, definition, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(reason(matcher.get_error()))
    return matcher


def reason(message: str) -> str:
    """Return the line of llguidance's error message that names the fault, without the drawing that may follow it."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    if message.startswith("oneOf constraints"):
        return ("a value may fit several branches of oneOf, and a grammar does not count them: use anyOf, or give the "
                "branches a required property with a const of its own in each")
    if "error: " in message:  # the regex parser says it last
        message = message.rpartition("error: ")[2]
    return (message.strip().splitlines() or ["unknown reason"])[0][:MAX_REASON]


def _check_schema(schema: Mapping[str, Any]) -> None:
    """Raise UserError for a schema that is nested too deep or has too many definitions."""
    definitions, depth, level = 0, 0, [schema]
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"json_schema must be nested at most {MAX_DEPTH} deep, and this one is deeper: move parts "
                            f"of it to $defs")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                definitions += sum(len(value[name]) for name in ("$defs", "definitions")
                                   if isinstance(value.get(name), dict))
            below += value.values() if isinstance(value, dict) else value
        level = below
    _check_definitions("definitions of json_schema", definitions)


def _check_definitions(name: str, count: int) -> None:
    if count > MAX_DEFINITIONS:
        raise UserError(f"the number of {name} must be at most {MAX_DEFINITIONS}, not {count}: give a smaller one")
