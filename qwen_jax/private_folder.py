"""Folders that no other user of the machine can write to, with this package's error for others."""

from __future__ import annotations

from pathlib import Path

from qwen_kernels import private_folder

from qwen_jax.errors import UserError


def open_private(folder: Path) -> int:
    """Make a folder that is not there, for its owner alone, and return a file descriptor of it.

    Raises OSError when it cannot be made or read, and UserError where others can write to it or replace it.
    """
    try:
        return private_folder.open_private(folder)
    except private_folder.NotPrivate as error:
        raise UserError(str(error)) from None
