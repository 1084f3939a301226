"""Choice of the size of decode steps: learns while the engine works which of the compiled programs are the fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from qwen_jax.engine.scheduling.sequence import StepPlan

WIDTHS = 3  # numbers of rows that are tried: the one that holds all decoding sequences, and those below it
DISCOUNT = 0.97  # of older observations, at every step: about the last 30 decide
EXPLORATION = 0.15  # half-width of the interval in which a cost may lie, in costs of the default
UNKNOWN = 2.0  # assumed cost of a choice that was never tried, in costs of the default
CREDIT = 5.0  # maximum savings that trials may use up, in costs of a step


@dataclass(frozen=True)
class Choice:
    """Size of a decode step: maximum number of rows, and maximum tokens per row that one dispatch generates."""

    rows: int
    steps: int


class DecodeAdaptation:
    """Chooses the size of decode steps by their measured seconds per token.

    There is one `Bandit` for each number of rows that all decoding sequences need, with and without others that wait.
    The default is one step for all decoding sequences, of as many tokens as the limits and the time of a dispatch
    allow. The alternatives are fewer rows at a time, which take turns, and single tokens.

    Args:
      decode_rows: rows of the compiled decode programs, ascending.
      steps: maximum tokens per row and dispatch.
      dispatch_seconds: maximum time of a dispatch; no chosen size exceeds it.
    """

    def __init__(self, decode_rows: tuple[int, ...], steps: int, dispatch_seconds: float) -> None:
        self._rows, self._steps, self._dispatch_seconds = decode_rows, steps, dispatch_seconds
        self._bandits: dict[tuple[int, bool], tuple[tuple[Choice, ...], Bandit]] = {}
        self._seconds: dict[int, float] = {}  # per token of a row, in the last step with this number of rows
        self._chosen: tuple[Bandit, int] | None = None

    def choices(self, decoding: int, single: bool) -> tuple[Choice, ...]:
        """Return the possible step sizes for `decoding` sequences, the default first. `single`: one token per row."""
        fitting = next((index for index, rows in enumerate(self._rows) if rows >= decoding), len(self._rows) - 1)
        widths = self._rows[max(0, fitting + 1 - WIDTHS): fitting + 1][::-1]
        steps = (1,) if single or self._steps == 1 else (self._steps, 1)
        return tuple(Choice(*pair) for pair in product(widths, steps))

    def choose(self, decoding: int, single: bool) -> Choice:
        """Return the size of the next decode step for `decoding` sequences. `single`: one token per row."""
        choices = self.choices(decoding, single)
        key = choices[0].rows, single
        if key not in self._bandits:
            self._bandits[key] = choices, Bandit(len(choices))
        bandit = self._bandits[key][1]
        index = bandit.choose()
        self._chosen = bandit, index
        rows, steps = choices[index].rows, choices[index].steps
        seconds = self._seconds.get(rows) or self._seconds.get(choices[0].rows) or self._dispatch_seconds
        return Choice(rows, max(1, min(steps, int(self._dispatch_seconds / seconds))))

    def record(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a decode step that took `seconds`; prefills and steps that check drafts are ignored."""
        chosen, self._chosen = self._chosen, None
        if plan.bucket.phase != "decode" or plan.bucket.tokens > 1:
            return
        self._seconds[plan.bucket.rows] = seconds / max(row.count for row in plan.rows)
        if chosen:
            bandit, index = chosen
            bandit.record(index, seconds, sum(row.count for row in plan.rows))

    def report(self) -> dict[str, dict[str, float]]:
        """Return the measured milliseconds per token of every size that was tried.

        The sizes ("rows x tokens") are grouped by the rows of the default, with and without others that wait.
        """
        return {f"{rows} rows{' while others wait' if single else ''}": {
            f"{choice.rows}x{choice.steps}": 1e3 * bandit.mean(index)
            for index, choice in enumerate(choices) if bandit.mean(index) is not None}
            for (rows, single), (choices, bandit) in sorted(self._bandits.items())}


class Bandit:
    """Learns by trying which of several choices costs least: call `choose`, do it, and `record` what it cost.

    Choice 0 is the default. For any costs, their sum stays below ``(1 + slack)`` times what the default would have cost
    for the same work, by its discounted mean at each step, plus what the dearest single step cost.

    Attributes:
      count, cost, work: sums over the steps of each choice, in which older steps count less.
      debt: seconds by which the costs so far exceed the bound, negative while there is credit.
    """

    def __init__(self, choices: int, slack: float = 0.1) -> None:
        self.slack = slack
        self.count, self.cost, self.work = ([0.0] * choices for _ in range(3))
        self.debt = 0.0
        self._last_work = 0.0

    def mean(self, choice: int) -> float | None:
        """Return the mean cost of a choice per unit of work; None for a choice that was never tried."""
        return self.cost[choice] / self.work[choice] if self.work[choice] else None

    def choose(self) -> int:
        """Return the choice that may have the lowest cost, among those that the bound on the costs permits to try."""
        base = self.mean(0)
        if base is None:
            return 0
        width = EXPLORATION * base * math.sqrt(math.log(max(sum(self.count), math.e)))
        lowest = [-math.inf if not count else self.mean(choice) - width / math.sqrt(count)
                  for choice, count in enumerate(self.count)]
        for choice in sorted(range(len(lowest)), key=lowest.__getitem__):
            expected = self.mean(choice) or UNKNOWN * base
            if choice == 0 or self.debt + self._last_work * (expected - (1 + self.slack) * base) <= 0:
                return choice
        return 0

    def record(self, choice: int, cost: float, work: float) -> None:
        """Record that a step with this choice did ``work`` units of work and cost ``cost`` seconds."""
        for sums in (self.count, self.cost, self.work):
            sums[:] = [DISCOUNT * value for value in sums]
        self.count[choice] += 1
        self.cost[choice] += cost
        self.work[choice] += work
        self._last_work = work
        expected = cost if choice == 0 else work * (self.mean(0) or 0.0)
        # Credit beyond some steps' worth is given up, so that a long good time does not pay for a long bad one.
        self.debt = max(self.debt + cost - (1 + self.slack) * expected, -CREDIT * expected)
