"""Count of the XLA compilations in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_backend_compiles = 0
_warmup_compiles = 0
_thread = threading.local()


def backend_compiles() -> int:
    """Return the number of XLA compilations in this process so far, for any reason."""
    return _backend_compiles


def unplanned_compiles() -> int:
    """Return the number of XLA compilations in this process so far that were not part of an engine's warm-up."""
    return _backend_compiles - _warmup_compiles


@contextmanager
def planned() -> Iterator[None]:
    """Count XLA compilations of this thread inside the ``with`` block as part of an engine's warm-up."""
    before, _thread.planned = is_planned(), True
    try:
        yield
    finally:
        _thread.planned = before


def is_planned() -> bool:
    """Return whether this thread's compilations are part of an engine's warm-up at present."""
    return getattr(_thread, "planned", False)


def _count(event: str, duration: float, **_) -> None:
    global _backend_compiles, _warmup_compiles
    if event == _COMPILE_EVENT:
        _backend_compiles += 1
        _warmup_compiles += is_planned()


jax.monitoring.register_event_duration_secs_listener(_count)
