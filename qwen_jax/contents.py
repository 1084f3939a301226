"""Digests of what files contain, which their names, sizes and times do not tell."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

THREADS = 4  # a thread hashes about 1 GB/s


def digest_of(value: object) -> str:
    """Return a digest of a value's ``repr``."""
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


@cache
def package_digest() -> str | None:
    """Return a digest of this package's sources, which also tells builds of one version apart."""
    package = Path(__file__).parent
    return FileSet.of(package, package.rglob("*.py")).digest()


@dataclass(frozen=True)
class FileSet:
    """Files of a folder as they were when this object was made.

    Attributes:
      root: the folder.
      states: for each file its path in the folder, and numbers that change whenever the file is changed or replaced.
    """

    root: Path
    states: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, root: Path, files: Iterable[Path]) -> FileSet:
        return cls(root, tuple((str(file.relative_to(root)), _state(file)) for file in sorted(files)))

    def digest(self) -> str | None:
        """Return a digest of the files' paths and contents; None if one has changed since this object was made."""
        names = [name for name, _ in self.states]
        try:
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
                contents = list(threads.map(lambda name: _contents(self.root / name), names))
            unchanged = FileSet.of(self.root, (self.root / name for name in names)) == self
        except OSError:
            return None
        return digest_of((names, contents)) if unchanged else None


def _state(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _contents(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
