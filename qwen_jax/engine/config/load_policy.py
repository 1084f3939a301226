"""Policy that changes between two parallel plans by the number of open requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import ParallelPlan


@dataclass
class LoadPolicy:
    """Two parallel plans, for few and for many open requests, between which an engine changes by itself.

    Few requests are answered soonest when all devices work on each of them (tensor parallelism); many are answered
    fastest together when the devices work on different ones (replicas). A plan is left only when the load has been the
    other's for a while, and between the two loads nothing changes: moving costs as much as some steps.

    Attributes:
      latency, throughput: the plans for few and for many requests.
      low: number of open requests up to which ``latency`` is better. high: number from which ``throughput`` is better.
      hold_seconds: time for which the load must stay on one side before the plan changes.

    Raises UserError for loads without a distance between them, and for a negative time.
    """

    latency: ParallelPlan
    throughput: ParallelPlan
    low: int
    high: int
    hold_seconds: float = 5.0
    _since: float | None = field(default=None, init=False, repr=False)  # start of the load that suits the other plan

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"low must be smaller than high, not {self.low} and {self.high}: the plans would alternate")
        if self.hold_seconds < 0:
            raise UserError(f"hold_seconds must be at least 0, not {self.hold_seconds}")

    def decide(self, plan: ParallelPlan, load: int, now: float) -> ParallelPlan | None:
        """Return the plan that an engine under ``plan`` should change to, or None to stay.

        load: number of open requests. now: time in seconds. Ask often: loads between two calls are not seen.
        """
        if plan == self.throughput:
            other, wanted = self.latency, load <= self.low
        else:
            other, wanted = self.throughput, load >= self.high
        if not wanted:
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        if now - self._since < self.hold_seconds:
            return None
        self._since = None
        return other
