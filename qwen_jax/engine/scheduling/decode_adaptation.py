"""Which of the compiled decode programs a step uses, learnt while the engine works."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.step_plan import StepPlan

WIDTHS = 3  # numbers of rows that are tried: the one that holds everybody, and those below it


@dataclass(frozen=True)
class Choice:
    """Most rows of a decode step, and most tokens per row and dispatch."""

    rows: int
    steps: int


class Adaptation:
    """A bandit for each size of the crowd, because what a token costs depends on that first of all.

    The default is one step for everybody, of as many tokens as the limits and the time of a dispatch allow. Others are
    fewer rows at a time, who take turns, and single tokens. What is learnt is seconds per token.

    Args:
      decode_rows: of the compiled buckets, ascending. steps: most tokens per row and dispatch.
      dispatch_seconds: how long a dispatch may take; a choice never makes it longer.
      slack: see `Bandit`: by how much adapting may be slower than the default.
    """

    def __init__(self, decode_rows: Sequence[int], steps: int, dispatch_seconds: float, slack: float = 0.1) -> None:
        self._rows, self._steps, self._dispatch, self._slack = tuple(decode_rows), steps, dispatch_seconds, slack
        self._bandits: dict[tuple[int, bool], tuple[tuple[Choice, ...], Bandit]] = {}
        self._seconds: dict[int, float] = {}  # of the last step of a bucket, per token of a row
        self._chosen: tuple[Bandit, int] | None = None

    @classmethod
    def of(cls, limits: Limits, dispatch_seconds: float) -> Adaptation:
        return cls(limits.decode_rows, limits.decode_steps, dispatch_seconds)

    def choices(self, decoding: int, single: bool) -> tuple[Choice, ...]:
        """For so many sequences, the default first. single: others wait, and a step is of one token anyway."""
        enough = next((index for index, rows in enumerate(self._rows) if rows >= decoding), len(self._rows) - 1)
        widths = self._rows[max(0, enough + 1 - WIDTHS): enough + 1][::-1]
        return tuple(Choice(*one) for one in product(widths, (1,) if single or self._steps == 1 else (self._steps, 1)))

    def choose(self, decoding: int, single: bool) -> Choice:
        """What the next decode step may use."""
        choices = self.choices(decoding, single)
        key = choices[0].rows, single
        if key not in self._bandits:
            self._bandits[key] = choices, Bandit(len(choices), self._slack)
        bandit = self._bandits[key][1]
        index = bandit.choose()
        self._chosen = bandit, index
        rows, steps = choices[index].rows, choices[index].steps
        seconds = self._seconds.get(rows) or self._seconds.get(choices[0].rows) or self._dispatch
        return Choice(rows, max(1, min(steps, int(self._dispatch / seconds))))

    def record(self, plan: StepPlan, seconds: float) -> None:
        """What became of the choice: a step that took so long. Only plain decode steps say something about it."""
        chosen, self._chosen = self._chosen, None
        if plan.bucket.phase != "decode" or plan.bucket.tokens > 1:
            return
        self._seconds[plan.bucket.rows] = seconds / max(row.count for row in plan.rows)
        if chosen:
            bandit, index = chosen
            bandit.record(index, seconds, sum(row.count for row in plan.rows))

    def report(self) -> dict[str, dict[str, float]]:
        """By size of the crowd: milliseconds per token of every choice that was tried, as rows x tokens."""
        return {f"{rows} rows{' while others wait' if single else ''}": {
            f"{choice.rows}x{choice.steps}": 1e3 * bandit.mean(index)
            for index, choice in enumerate(choices) if bandit.mean(index) is not None}
            for (rows, single), (choices, bandit) in sorted(self._bandits.items())}


DISCOUNT = 0.97  # of what was seen, at every step: about the last 30 decide

EXPLORATION = 0.15  # width of what is still thought possible, in costs of the default

UNKNOWN = 2.0  # cost that a choice never tried is feared to have, in costs of the default

CREDIT = 5.0  # most that may be saved up for trials, in costs of a step



class Bandit:
    """Call `choose`, do it, `record` what it cost. Choice 0 is the default.

    The bound: whatever the costs do, their sum stays below ``(1 + slack)`` times what the default would have cost for
    the same work, by its discounted mean at each step, plus what the dearest single step cost.

    Attributes:
      count, cost, work: of each choice, discounted sums over its steps.
      debt: seconds by which the costs so far exceed the bound, negative while there is credit.
    """

    def __init__(self, choices: int, slack: float = 0.1) -> None:
        self.slack = slack
        self.count, self.cost, self.work = ([0.0] * choices for _ in range(3))
        self.debt = 0.0
        self._last_work = 0.0

    def mean(self, choice: int) -> float | None:
        """Cost per unit of work; None for what was never tried."""
        return self.cost[choice] / self.work[choice] if self.work[choice] else None

    def choose(self) -> int:
        """The choice with the least cost that is still thought possible, among those that the budget allows."""
        base = self.mean(0)
        if base is None:
            return 0
        sharding = EXPLORATION * base * math.sqrt(math.log(max(sum(self.count), math.e)))
        least = [-math.inf if not count else self.mean(choice) - sharding / math.sqrt(count)
                 for choice, count in enumerate(self.count)]
        for choice in sorted(range(len(least)), key=least.__getitem__):
            feared = self.mean(choice) or UNKNOWN * base
            if choice == 0 or self.debt + self._last_work * (feared - (1 + self.slack) * base) <= 0:
                return choice
        return 0

    def record(self, choice: int, cost: float, work: float) -> None:
        """A step of ``work`` units took ``cost`` seconds."""
        for sums in (self.count, self.cost, self.work):
            sums[:] = [DISCOUNT * one for one in sums]
        self.count[choice] += 1
        self.cost[choice] += cost
        self.work[choice] += work
        self._last_work = work
        expected = cost if choice == 0 else work * (self.mean(0) or 0.0)
        # Credit beyond some steps' worth is given up, so that a long good time does not pay for a long bad one.
        self.debt = max(self.debt + cost - (1 + self.slack) * expected, -CREDIT * expected)
