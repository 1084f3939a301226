"""What a step of each bucket costs: a few measured points, and lines between them."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.step_plan import StepPlan


@dataclass(frozen=True)
class Cost:
    """Seconds of a step.

    Attributes:
      base: of a step on a short context; for a decode step, of one token per row.
      token: of every further token of a decode step.
      context: more, for each token of context beyond ``short``; in a decode step for each token that it generates.
      short: that context, in tokens.
    """

    base: float
    token: float
    context: float
    short: int

    @classmethod
    def through(cls, short: int, long: int, base: float, further: float, far: float, steps: int) -> Cost:
        """From three measured steps: the ``base``; one of ``steps`` tokens (``further``); and the base with ``long``
        tokens of context (``far``). Noise must not make anything cost less than nothing."""
        token = max(0.0, (further - base) / (steps - 1)) if steps > 1 else 0.0
        return cls(base, token, max(0.0, (far - base) / (long - short)) if long > short else 0.0, short)

    def seconds(self, tokens: int, context: int, share: float = 1.0) -> float:
        """tokens: of a decode step, per row. share: of the rows that are computed at all."""
        one = self.context * max(0, context - self.short)
        return share * (self.base + one + (tokens - 1) * (self.token + one))


def seconds_of(plan: StepPlan, costs: dict[Bucket, Cost]) -> float:
    """What a planned step will take."""
    bucket = plan.bucket
    context = max(row.start for row in plan.rows)
    if bucket.phase == "decode":
        return costs[bucket].seconds(max(row.count for row in plan.rows), context)
    groups = -(-len(plan.rows) // bucket.micro_rows)  # groups of padding rows are not run
    return costs[bucket].seconds(1, context, groups * bucket.micro_rows / bucket.rows)
