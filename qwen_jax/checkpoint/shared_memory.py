"""A copy of a checkpoint in a machine's shared memory, for all processes of the machine that load it.

A converted checkpoint is decoded and checked against its hashes once, into a folder of safetensors in shared memory
(tmpfs), which every process then reads; the arrays that it puts on its devices are its own. A Hugging Face folder needs
no copy: all processes read it through the kernel's page cache.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_jax.atomic import remove_unused
from qwen_jax.checkpoint.conversion import export
from qwen_jax.checkpoint.source import MANIFEST, Source, read_manifest
from qwen_jax.checkpoint.tensors import stored_dtypes
from qwen_jax.errors import UserError
from qwen_jax.private_folder import open_private
from qwen_jax.quantization import E4M3

logger = logging.getLogger(__name__)
_locks: dict[Path, int] = {}  # copies that this process uses -> file descriptors that hold a shared lock on them


def shared_copy(source: Source, root: Path | None = None) -> Source:
    """Return the copy of a checkpoint in shared memory, which the first caller makes while the others wait.

    The copy stays until no process that asked for it is alive. Returns ``source`` itself where there is nothing to copy
    (a Hugging Face folder, a checkpoint in FP8, whose scales a copy would lose), no shared memory, or not enough.
    Raises UserError for a damaged checkpoint.

    Args:
      root: a folder in memory that only this user can write to.
    """
    root = root or Path(f"/dev/shm/qwen-jax-{os.geteuid()}")
    if source.kind != "orbax" or E4M3 in stored_dtypes(source.config, read_manifest(source)).values():
        return source
    try:
        os.close(open_private(root))
    except OSError:
        return source
    except UserError as error:  # another user's doing must not keep a server from starting
        logger.warning("%s is read from the disk, not from shared memory: %s", source.path, error)
        return source
    folder = root / hashlib.sha256((source.path / MANIFEST).read_bytes()).hexdigest()[:32]
    with _locked(root):
        if not folder.exists():
            remove_unused(root)
            size = sum(file.stat().st_size for file in source.params.rglob("*") if file.is_file())
            if shutil.disk_usage(root).free < 1.2 * size:
                logger.info("there is no room for %s in shared memory: it is read from the disk", source.path)
                return source
            export(source.path, folder)
        if folder not in _locks:
            _locks[folder] = handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH)
    return Source("hf", folder)


@atexit.register
def release() -> None:
    """Give up this process's copies of checkpoints in shared memory, and remove those that no other process uses."""
    for folder in list(_locks):
        with _locked(folder.parent):
            os.close(_locks.pop(folder))
            remove_unused(folder.parent)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock on ``root`` under which a process makes, takes or removes copies of checkpoints."""
    handle = open_private(root)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
