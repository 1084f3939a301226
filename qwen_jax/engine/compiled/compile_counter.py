"""Count of the XLA compilations in this process."""

from __future__ import annotations

from contextlib import contextmanager

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_backend_compiles = 0
_warmup_compiles = 0


def backend_compiles() -> int:
    """Return the number of XLA compilations in this process so far, for any reason."""
    return _backend_compiles


def unplanned_compiles() -> int:
    """Return the number of XLA compilations in this process so far that were not part of an engine's warm-up."""
    return _backend_compiles - _warmup_compiles


@contextmanager
def planned():
    """Count XLA compilations inside the ``with`` block as part of an engine's warm-up."""
    global _warmup_compiles
    before = _backend_compiles
    try:
        yield
    finally:
        _warmup_compiles += _backend_compiles - before


def _count(event: str, duration: float, **_) -> None:
    global _backend_compiles
    _backend_compiles += event == _COMPILE_EVENT


jax.monitoring.register_event_duration_secs_listener(_count)
