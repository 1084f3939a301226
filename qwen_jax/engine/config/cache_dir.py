"""Folder in which compiled programs are kept."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """``$QWEN_JAX_CACHE``, else ``~/.cache/qwen-jax``; the programs are in ``executables`` below it."""
    root = os.environ.get("QWEN_JAX_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "qwen-jax") / "executables"
