"""Writing of folders and files so that they appear complete or not at all, even if the process is killed."""

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

    Everything is flushed to disk before the rename. Temporary folders that killed runs left behind are removed first;
    the folder of a run that is still alive is known by the lock that the run holds on it.

    Raises UserError when ``dst`` exists, when fewer than ``needed_bytes`` are free, or when the disk fills up.
    """
    with _partial(Path(dst).absolute(), needed_bytes) as temporary:
        yield temporary


@contextmanager
def new_file(dst: str | Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary path for a file; move the file to ``dst`` when the block succeeds, remove it otherwise.

    Space, errors and killed runs are handled as in `new_folder`.
    """
    dst = Path(dst).absolute()
    with _partial(dst, needed_bytes, inside=dst.name) as file:
        yield file


def replace_file(path: Path, content: bytes, private: bool = False) -> None:
    """Replace the file ``path`` at once: a reader finds the new content or what was there before, never a part.

    private: only the owner may read the file. The folder must exist. Raises OSError when the file cannot be written.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        if not private:
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def _partial(dst: Path, needed_bytes: int, inside: str = "") -> Iterator[Path]:
    """Yield a temporary folder that becomes ``dst``, or a file in it, named ``inside``, that becomes ``dst``."""
    _refuse_existing(dst)
    prefix = f".{dst.name}.partial-"
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        remove_unused(dst.parent, prefix)
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
        _flush_all(temporary)
        _refuse_existing(dst)
        os.rename(temporary / inside, dst)
        if inside:
            shutil.rmtree(temporary, ignore_errors=True)
        _flush(dst.parent)
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


def remove_unused(parent: Path, prefix: str = "") -> None:
    """Remove this user's folders in ``parent`` on which no living process holds a lock.

    Links and the folders of other users stay: others may be able to write to ``parent``.

    prefix: beginning of the names of the folders that are removed.
    """
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix):
            continue
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(handle).st_uid == os.geteuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)  # which follows no link either
        except BlockingIOError:
            pass  # another process uses it
        finally:
            os.close(handle)


def _is_disk_full(error: BaseException | None) -> bool:
    """Return True when ``error`` or one of its causes says that the disk is full.

    TensorStore raises a ValueError that holds the system's message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flush_all(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for file in files:
            _flush(Path(root) / file)
        _flush(Path(root))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
