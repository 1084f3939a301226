"""Helpers that add subcommands and arguments to argparse, with arguments made from the fields of an `Options` class."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import msgspec

from qwen_jax.serving.options import Options
from qwen_jax.structs import convert

Kind = TypeVar("Kind", bound=Options)


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str,
                ) -> argparse.ArgumentParser:
    """Add a subcommand to argparse and return its parser, which has no arguments yet.

    Args:
      commands: the object that ``add_subparsers`` returned.
      run: called with the parsed arguments; returns an exit code, None for 0.
      text: one or two sentences for the help.
    """
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, or_preset: bool = False) -> None:
    """Add the argument MODEL to a parser; with ``or_preset``, MODEL may name an architecture without weights too."""
    text = "Hugging Face folder, converted checkpoint, hub id, 'bundled' or 'yardstick'"
    parser.add_argument("model", metavar="MODEL", help=f"{text}; or a preset such as qwen2.5-7b" if or_preset else text)


def add_options(parser: argparse.ArgumentParser, kind: type[Options], names: Collection[str] | None = None) -> None:
    """Add a command-line argument for every field of the options class ``kind``, or only for those in ``names``."""
    for field in msgspec.structs.fields(kind):
        if names is None or field.name in names:
            parser.add_argument(_argument(field), default=field.default, **_how_to_parse(field))


def read_options(args: argparse.Namespace, kind: type[Kind]) -> Kind:
    """Return an instance of the options class ``kind`` with the values of the arguments that `add_options` added.

    UserError for a value out of range.
    """
    values = {}
    for field in msgspec.structs.fields(kind):
        argument = _argument(field)
        values[field.name] = convert(getattr(args, argument[2:].replace("-", "_")), field.type, argument)
    return kind(**values)


def _argument(field: msgspec.structs.FieldInfo) -> str:
    """Return the command-line argument of an options field, such as ``--max-requests``."""
    return _parts(field)[1].extra["argument"] or "--" + field.name.replace("_", "-")


def _how_to_parse(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """Return an options field's keywords for argparse's ``add_argument``: type or choices, metavar and help."""
    hint, meta = _parts(field)
    if hint is bool:
        return {"action": "store_true", "help": meta.description}
    shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
    text = meta.description if shown is None else f"{meta.description} (default: {shown})"
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint), "help": text}
    return {"type": hint, "metavar": meta.extra["metavar"], "help": text}


def _parts(field: msgspec.structs.FieldInfo) -> tuple[Any, msgspec.Meta]:
    """Return an options field's type and metadata, from ``Annotated[type, metadata]`` or ``Annotated[...] | None``."""
    optional = typing.get_origin(field.type) is typing.Union
    return typing.get_args(typing.get_args(field.type)[0] if optional else field.type)
