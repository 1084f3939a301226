"""Folder in which work is kept for later processes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of everything that is kept: ``$QWEN_JAX_CACHE``, else ``~/.cache/qwen-jax``."""
    root = os.environ.get("QWEN_JAX_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "qwen-jax"
