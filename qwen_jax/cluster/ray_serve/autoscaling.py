"""How many engines there should be."""

from __future__ import annotations

import math
from collections.abc import Callable

from qwen_jax.cluster.ray_serve.config import Autoscaling


class Autoscaler:
    """Wants as many engines as the open requests need at ``target`` each, once they have needed more for
    ``up_seconds``, or fewer for ``down_seconds``: as many more, or fewer, as they needed all that time."""

    def __init__(self, options: Autoscaling) -> None:
        self.options = options
        self._more: tuple[float, int] | None = None  # since when more are needed, and the fewest of them
        self._fewer: tuple[float, int] | None = None  # since when fewer are, and the most of them

    def wanted(self, now: float, requests: int, engines: int) -> int:
        """
        Args:
          now: seconds, of any clock. requests: open ones. engines: that there are, starting ones among them.
        """
        options = self.options
        needed = min(max(math.ceil(requests / options.target), options.min), options.max)
        self._more = _held(self._more, now, needed, min) if needed > engines else None
        self._fewer = _held(self._fewer, now, needed, max) if needed < engines else None
        if self._more and now - self._more[0] >= options.up_seconds:
            return self._more[1]
        if self._fewer and now - self._fewer[0] >= options.down_seconds:
            return self._fewer[1]
        return min(max(engines, options.min), options.max)


def _held(before: tuple[float, int] | None, now: float, needed: int, keep: Callable[[int, int], int],
          ) -> tuple[float, int]:
    return (before[0], keep(before[1], needed)) if before else (now, needed)
