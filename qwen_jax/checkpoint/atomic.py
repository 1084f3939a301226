"""A new folder or file that appears complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_jax.errors import UserError

_SLACK = 32 << 20  # metadata, tokenizer files and block rounding


@contextmanager
def new_folder(dst: str | Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder beside ``dst``; rename it to ``dst`` when the block succeeds, remove it otherwise.

    Everything is flushed to disk before the rename. Folders left by killed runs are removed first: the running owner
    of such a folder holds a lock on it, which dies with its process.

    Raises UserError when ``dst`` exists, when fewer than ``needed_bytes`` are free, or when the disk fills up.
    """
    with _partial(Path(dst).absolute(), needed_bytes) as temporary:
        yield temporary


@contextmanager
def new_file(dst: str | Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a path to write a file to, and move the file to ``dst`` when the block succeeds; as `new_folder`."""
    dst = Path(dst).absolute()
    with _partial(dst, needed_bytes, inside=dst.name) as file:
        yield file


@contextmanager
def _partial(dst: Path, needed_bytes: int, inside: str = "") -> Iterator[Path]:
    """inside: the name, in the temporary folder, of what becomes ``dst``; by default the folder itself."""
    _refuse_existing(dst)
    prefix = f".{dst.name}.partial-"
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(dst.parent, prefix)
        free = shutil.disk_usage(dst.parent).free
        if free < needed_bytes + _SLACK:
            raise UserError(f"not enough disk space for {dst}: {(needed_bytes + _SLACK) / 1e9:.2f} GB needed, "
                            f"{free / 1e9:.2f} GB free")
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=dst.parent))
    except OSError as error:
        raise UserError(f"cannot write {dst}: {error.strerror or error}") from error
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        yield temporary / inside
        _sync(temporary)
        _refuse_existing(dst)
        os.rename(temporary / inside, dst)
        if inside:
            shutil.rmtree(temporary, ignore_errors=True)
        _sync_one(dst.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_full(error):
            raise UserError(f"the disk filled up while writing {dst}: nothing was kept; free some space and "
                            "run it again") from error
        raise
    finally:
        os.close(lock)


def _refuse_existing(dst: Path) -> None:
    if os.path.lexists(dst):
        raise UserError(f"{dst} already exists: choose another name or remove it first")


def _remove_stale(parent: Path, prefix: str) -> None:
    for folder in parent.iterdir():
        if folder.name.startswith(prefix) and folder.is_dir():
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass  # another run is writing it
            finally:
                os.close(handle)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` or a cause of it is a full disk; TensorStore reports one as a ValueError with the text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for file in files:
            _sync_one(Path(root) / file)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
