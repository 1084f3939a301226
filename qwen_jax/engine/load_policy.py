"""When an engine goes from a plan for latency to one for throughput, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import ParallelPlan


@dataclass
class LoadPolicy:
    """Two plans, and the load that each is for.

    Few requests are answered soonest when all devices work on each of them (tensor parallelism); many are answered
    fastest together when the devices work on different ones (replicas). A plan is left only when the load has been the
    other's for a while, and between the two loads nothing changes: moving costs as much as some steps.

    Attributes:
      latency, throughput: the plans.
      low: requests, waiting and running, up to which ``latency`` is the better one; high: from which ``throughput`` is.
      hold_seconds: for how long the load must have been so.

    Raises UserError for loads that leave no distance, and for a negative time.
    """

    latency: ParallelPlan
    throughput: ParallelPlan
    low: int
    high: int
    hold_seconds: float = 5.0
    _since: float | None = field(default=None, init=False, repr=False)  # the load has been for the other plan

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"low={self.low} and high={self.high}: low must be smaller, or the plans would alternate")
        if self.hold_seconds < 0:
            raise UserError(f"hold_seconds must not be negative, and is {self.hold_seconds}")

    def decide(self, plan: ParallelPlan, load: int, now: float) -> ParallelPlan | None:
        """The plan to go to, or None to stay, with ``load`` requests at the time ``now`` in seconds. To be asked often:
        a load that nobody asked about was not seen."""
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
