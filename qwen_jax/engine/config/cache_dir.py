"""Folder in which compiled programs are kept."""

from __future__ import annotations

from pathlib import Path

from qwen_kernels.cache import cache_root


def default_cache_dir() -> Path:
    """Return the folder of compiled programs."""
    return cache_root() / "executables"
