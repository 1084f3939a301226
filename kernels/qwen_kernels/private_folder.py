"""Folders that no other user of the machine can write to: of what is run as code, or removed without a question."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotPrivate(Exception):
    """Error for a folder in which another user can replace what is run or removed; the message says why."""


def make_private(folder: Path) -> None:
    """Make a folder, and those above it, as far as they are not there, each for its owner alone."""
    for missing in reversed([path for path in (folder, *folder.parents) if not os.path.lexists(path)]):
        try:
            missing.mkdir(0o700)
        except FileExistsError:  # another process made it
            pass


def open_private(folder: Path) -> int:
    """Make a folder that is not there, for its owner alone, and return a file descriptor of it.

    A link at its place is not followed. Raises OSError when the folder cannot be made or read, and NotPrivate unless it
    belongs to this user, only this user can write to it, and no other user can replace it or a folder above it.
    """
    folder = folder.absolute()
    make_private(folder)
    for parent in {*folder.parents, *folder.parent.resolve().parents, folder.parent.resolve()}:
        if problem := _others_may_replace(parent.stat()):
            raise NotPrivate(f"the folders above {folder} must be ones in which others replace nothing, not {parent}, "
                            f"{problem}: name a folder of your own")
    if folder.is_symlink():
        raise NotPrivate(f"{folder} must be a folder, not a link: remove it, or name a folder of your own")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(handle)
        if problem := _of_another(status, (os.geteuid(),)) or _writable(status, OTHERS_WRITE):
            raise NotPrivate(f"{folder} must be a folder that only you can write to, not {problem}: chmod 700 it, or "
                            "name a folder of your own")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _others_may_replace(status: os.stat_result) -> str | None:
    """Return why another user could replace what is in a folder; None where only this user and root can."""
    if problem := _of_another(status, (0, os.geteuid())):
        return problem
    if status.st_mode & stat.S_ISVTX:  # as /tmp: entries are replaced by their owners alone
        return None
    return _writable(status, stat.S_IWOTH if _is_own_group(status.st_gid) else OTHERS_WRITE)


def _of_another(status: os.stat_result, users: tuple[int, ...]) -> str | None:
    return None if status.st_uid in users else f"which belongs to user {status.st_uid}"


def _writable(status: os.stat_result, bits: int) -> str | None:
    return f"which has mode {stat.S_IMODE(status.st_mode):o}" if status.st_mode & bits else None


def _is_own_group(group: int) -> bool:
    """Return whether a group is this user's own, with no other member, as many systems give each user."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and entry.gr_name == user.pw_name and not set(entry.gr_mem) - {user.pw_name}
