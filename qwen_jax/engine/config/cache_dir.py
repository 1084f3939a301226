"""Folder in which compiled programs are kept."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Return the folder of compiled programs: ``executables`` in ``$QWEN_JAX_CACHE``, else in ``~/.cache/qwen-jax``."""
    root = os.environ.get("QWEN_JAX_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "qwen-jax") / "executables"
