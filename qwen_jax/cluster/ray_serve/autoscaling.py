"""Autoscaling: the number of engines that a cluster should have, from its number of open requests."""

from __future__ import annotations

import math
from collections.abc import Callable

from qwen_jax.cluster.ray_serve.config import Autoscaling


class Autoscaler:
    """Decides how many engines there should be, from the number of open requests over time.

    The number rises once more engines have been needed for ``up_seconds``, and falls once fewer have been needed for
    ``down_seconds``; it becomes the one nearest to the present number that was needed in all that time.
    """

    def __init__(self, options: Autoscaling) -> None:
        self.options = options
        self._more: tuple[float, int] | None = None  # time since which more are needed, and the fewest needed since
        self._fewer: tuple[float, int] | None = None  # time since which fewer are needed, and the most needed since

    def wanted(self, now: float, requests: int, engines: int) -> int:
        """Return the number of engines that there should be.

        Args:
          now: seconds of any clock.
          requests: number of open requests.
          engines: number of engines, including those that are starting.
        """
        options = self.options
        needed = min(max(math.ceil(requests / options.target), options.min), options.max)
        self._more = _extend(self._more, now, needed, min) if needed > engines else None
        self._fewer = _extend(self._fewer, now, needed, max) if needed < engines else None
        if self._more and now - self._more[0] >= options.up_seconds:
            return self._more[1]
        if self._fewer and now - self._fewer[0] >= options.down_seconds:
            return self._fewer[1]
        return min(max(engines, options.min), options.max)


def _extend(period: tuple[float, int] | None, now: float, needed: int, combine: Callable[[int, int], int],
            ) -> tuple[float, int]:
    """Return a period, of its begin and a number of engines, that goes on or begins now."""
    return (period[0], combine(period[1], needed)) if period else (now, needed)
