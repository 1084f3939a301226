"""Prediction of the time that a request trace takes: the real scheduler runs on measured costs instead of a device."""

from __future__ import annotations

from qwen_jax.engine.core.engine_core import DISPATCH_SECONDS
from qwen_jax.engine.scheduling.buckets import Bucket, Limits
from qwen_jax.engine.scheduling.page_pool import PagePool
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.sequence import Sequence
from qwen_jax.tuning.step_costs import Cost, seconds_of
from qwen_jax.tuning.workloads import Trace


def simulate(trace: Trace, table: tuple[Bucket, ...], limits: Limits, policy: SchedulePolicy, num_pages: int,
             costs: dict[Bucket, Cost], step_seconds: float = 0.0) -> float:
    """Return the predicted seconds until every request of a trace is answered.

    costs: cost of a step of each bucket. step_seconds: time of the host between two steps.
    """
    scheduler = Scheduler(table, limits, PagePool(num_pages), policy, prefix_cache=False)
    for number, (prompt, answer) in enumerate(zip(trace.prompts, trace.answers, strict=True)):
        scheduler.add(Sequence(number, [0] * prompt, answer))
    total, token_seconds = 0.0, None  # token_seconds: seconds per token of the last decode step
    while (plan := scheduler.plan(max(1, int(DISPATCH_SECONDS / (token_seconds or DISPATCH_SECONDS))))) is not None:
        took = seconds_of(plan, costs)
        total += took + step_seconds
        if plan.bucket.phase == "decode":
            token_seconds = took / max(row.count for row in plan.rows)
            scheduler.commit(plan, [[0] * row.count for row in plan.rows])
        else:
            scheduler.commit(plan, [[0] for _ in plan.rows])
    return total
