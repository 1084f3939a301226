"""How many pages of keys the portable attention takes at a time, for the programs that are lowered meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_kernels.attention import xla

_lock = threading.Lock()  # programs are lowered on several threads, and the kernel's numbers are its module's


@contextmanager
def attention_tiles(pages: int) -> Iterator[None]:
    """Lower inside with chunks of ``pages``, a positive number; with 0 the kernel decides, as elsewhere."""
    with _lock:
        kept = xla.CHUNK_PAGES, xla.DECODE_CHUNK_PAGES
        try:
            if pages:
                xla.CHUNK_PAGES = xla.DECODE_CHUNK_PAGES = pages
            yield
        finally:
            xla.CHUNK_PAGES, xla.DECODE_CHUNK_PAGES = kept
