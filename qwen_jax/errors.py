"""The exception for a user's mistake, and a check that raises it."""

import operator


class UserError(ValueError):
    """A user's mistake, described in one line: what is wrong and what to do about it.

    The command line prints the message and exits with 2; Python callers catch it as a ``ValueError``.
    """


class UnknownAdapter(UserError):
    """A request for a LoRA adapter that is not loaded."""


class PromptTooLong(UserError):
    """A prompt that does not fit into the engine's context, or leaves no room in it for an answer."""


def check_positive_integer(name: str, value: object) -> None:
    """Raise UserError unless ``value``, which the message calls ``name``, is an integer of at least 1."""
    try:
        valid = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        valid = False
    if not valid:
        raise UserError(f"{name} must be a positive integer, not {value!r}")
