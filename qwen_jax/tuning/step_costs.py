"""Cost in seconds of a step of each bucket, as straight lines through a few measured points."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.sequence import StepPlan


@dataclass(frozen=True)
class Cost:
    """Time of a step of one bucket, in seconds, linear in the tokens that it generates and in its context.

    Attributes:
      base: time of a step on a short context; for a decode step, with one token per row.
      token: time of every further token of a decode step.
      context: added time for each token of context beyond ``short``; in a decode step for each generated token.
      short: length of the short context, in tokens.
    """

    base: float
    token: float
    context: float
    short: int

    @classmethod
    def through(cls, short: int, long: int, base: float, further: float, far: float, steps: int) -> Cost:
        """Return the cost of a bucket that fits three measured steps. Noise does not make a cost negative.

        base: seconds of a step on ``short`` tokens of context. further: seconds of the same step with ``steps`` tokens.
        far: seconds of the first step on ``long`` tokens of context.
        """
        token = max(0.0, (further - base) / (steps - 1)) if steps > 1 else 0.0
        return cls(base, token, max(0.0, (far - base) / (long - short)) if long > short else 0.0, short)

    def seconds(self, tokens: int, context: int, share: float = 1.0) -> float:
        """Return the seconds of a step that generates `tokens` per row after `context` tokens.

        share: share of the rows that are computed.
        """
        added = self.context * max(0, context - self.short)
        return share * (self.base + added + (tokens - 1) * (self.token + added))


def seconds_of(plan: StepPlan, costs: dict[Bucket, Cost]) -> float:
    """Return the seconds that a planned step takes, predicted from the measured costs of buckets."""
    bucket = plan.bucket
    context = max(row.start for row in plan.rows)
    if bucket.phase == "decode":
        return costs[bucket].seconds(max(row.count for row in plan.rows), context)
    groups = -(-len(plan.rows) // bucket.micro_rows)  # groups that hold only padding rows are not run
    return costs[bucket].seconds(1, context, groups * bucket.micro_rows / bucket.rows)
