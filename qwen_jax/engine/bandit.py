"""A choice that is made again and again, of which one learns only what it cost. Pure Python, without a clock.

Discounted UCB (Garivier and Moulines 2011, https://arxiv.org/abs/0805.3415) follows costs that change: what was seen
long ago counts less, so every choice is tried again some time. Around it stands a budget, as in conservative bandits
(Wu et al. 2016, https://arxiv.org/abs/1602.04282): no trial is made that has not been earned before.
"""

from __future__ import annotations

import math

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
        spread = EXPLORATION * base * math.sqrt(math.log(max(sum(self.count), math.e)))
        least = [-math.inf if not count else self.mean(choice) - spread / math.sqrt(count)
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
