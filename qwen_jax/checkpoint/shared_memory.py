"""One copy of a checkpoint in a machine's memory, for all processes there that load it.

A converted checkpoint is decoded and checked against its hashes once, into a folder of safetensors in shared memory
(tmpfs), which every process then reads; what it puts on its devices is its own. A Hugging Face folder needs none of
this: reading it already goes through the one copy in the kernel's page cache.
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

from qwen_jax.checkpoint.conversion import export
from qwen_jax.checkpoint.source import MANIFEST, Source, read_manifest
from qwen_jax.checkpoint.tensors import stored_dtypes
from qwen_jax.errors import UserError
from qwen_jax.quantization import E4M3

logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # copies that this process uses, by open folders with a shared lock


def shared_copy(source: Source, root: Path | None = None) -> Source:
    """The copy of a checkpoint in shared memory, made by the first process that asks; the others wait for it.

    It stays until no process that asked for it is alive. ``source`` itself comes back where there is nothing to copy
    (a Hugging Face folder, a checkpoint in FP8, whose scales a copy would lose), no shared memory, or not enough.
    Raises UserError for a damaged checkpoint.

    Args:
      root: a folder in memory that only this user can write to.
    """
    root = root or Path(f"/dev/shm/qwen-jax-{os.getuid()}")
    if source.kind != "orbax" or E4M3 in stored_dtypes(source.config, read_manifest(source)).values():
        return source
    try:
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return source
    folder = root / hashlib.sha256((source.path / MANIFEST).read_bytes()).hexdigest()[:32]
    with _locked(root):
        if not folder.exists():
            _remove_unused(root)
            size = sum(file.stat().st_size for file in source.params.rglob("*") if file.is_file())
            if shutil.disk_usage(root).free < 1.2 * size:
                logger.info("there is no room for %s in shared memory: it is read from the disk", source.path)
                return source
            export(source.path, folder)
        if folder not in _held:
            _held[folder] = handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH)
    return Source("hf", folder)


@atexit.register
def release() -> None:
    """Lets go of this process's copies; those that nobody else uses are removed."""
    for folder in list(_held):
        with _locked(folder.parent):
            os.close(_held.pop(folder))
            _remove_unused(folder.parent)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """What makes, takes or removes copies does so alone."""
    handle = os.open(root, os.O_RDONLY)
    try:
        if os.fstat(handle).st_uid != os.getuid():
            raise UserError(f"{root} belongs to another user: remove it")
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_unused(root: Path) -> None:
    """Copies that no living process has, and unfinished ones: the lock on ``root`` is ours."""
    for folder in root.iterdir():
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)
