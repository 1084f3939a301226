"""Conversion of plain values from files and command lines to typed structs, with readable error messages."""

from __future__ import annotations

import re
import typing
from typing import Any, TypeVar

import msgspec

from qwen_jax.errors import UserError

Kind = TypeVar("Kind")


def convert(value: Any, kind: type[Kind], name: str) -> Kind:
    """Convert plain values (numbers, texts, lists, dicts) to the type ``kind``, such as a `msgspec` struct.

    Args:
      name: name of the value in error messages; keys inside of it have their own names, such as `server.port`.
    Raises:
      UserError: an unknown or missing key, or a value of another type or out of range; the message names the key.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(_explain(error, value, kind, name)) from None


def _explain(error: msgspec.ValidationError, value: Any, kind: Any, name: str) -> str:
    """Rewrite msgspec's error ``Expected `int` >= 1 - at `$.steps` `` as ``steps must be int >= 1, not 0``."""
    problem, _, key = str(error).replace("`", "").partition(" - at $.")
    for part in re.findall(r"\w+", key):
        if part.isdigit():
            value = value[int(part)]
        else:
            value, kind = value[part], typing.get_type_hints(_struct_of(kind))[part]
    where = f"[{key}]: " if key else ""
    if problem.startswith("Object contains unknown field "):
        known = ", ".join(_struct_of(kind).__struct_fields__)
        return f"{where}unknown key {problem.split()[-1]}; known keys: {known}"
    if problem.startswith("Object missing required field "):
        return f"{where}missing key {problem.split()[-1]}"
    if problem.startswith("Invalid enum value "):
        return f"{key or name} must be {' or '.join(map(repr, typing.get_args(kind)))}, not {value!r}"
    if problem.startswith("Expected "):
        rule = problem.removeprefix("Expected ").partition(", got ")[0]
        return f"{key or name} must be {rule.replace('object', 'table').replace(' | null', '')}, not {value!r}"
    return f"{where}{problem}"  # from a __post_init__


def _struct_of(hint: Any) -> type:
    """Return the struct class in a type hint such as ``Lora``, ``Lora | None`` or ``tuple[Stage, ...]``."""
    return next(choice for choice in (hint, *typing.get_args(hint))
                if isinstance(choice, type) and issubclass(choice, msgspec.Struct))
