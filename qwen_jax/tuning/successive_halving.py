"""Which of a few choices is really the fastest, by running them beside the default."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any

LEAST_ROUNDS = 3  # that decide something
MOST_ROUNDS = 9  # of the last comparison
# What counts as no loss on a trace: a median within noise of the default's, and few rounds that say otherwise.
LEAST_MEDIAN, LEAST_QUARTILE = 0.99, 0.95
LEAST_GAIN = 1.02  # over all traces, for a change to be worth it


@dataclass
class Heats:
    """What one choice took, by trace: seconds of the default and its own, of the same round."""

    pairs: dict[Any, list[tuple[float, float]]] = field(default_factory=dict)

    def ratio(self, trace: Any) -> float:
        """The median of the rounds: above 1 where the choice is faster."""
        return median(self._ratios(trace))

    def _ratios(self, trace: Any) -> list[float]:
        return sorted(default / own for default, own in self.pairs[trace])

    @property
    def holds(self) -> bool:
        """Whether it gains something, and loses on no trace."""
        quartiles = [ratios[len(ratios) // 4] for ratios in map(self._ratios, self.pairs)]
        return self.rounds >= LEAST_ROUNDS and self.mean >= LEAST_GAIN and self.worst >= LEAST_MEDIAN and (
            min(quartiles) >= LEAST_QUARTILE)

    @property
    def mean(self) -> float:
        return geometric_mean([self.ratio(trace) for trace in self.pairs])

    @property
    def worst(self) -> float:
        return min(self.ratio(trace) for trace in self.pairs)

    @property
    def rounds(self) -> int:
        return min(map(len, self.pairs.values()), default=0)


def race(default: Any, choices: Sequence[Any], traces: Sequence[Any], run: Callable[[Any, Any, int], float],
         deadline: float, clock: Callable[[], float] = time.monotonic, tick: Callable[[str], None] = lambda _: None
         ) -> tuple[Any | None, dict[Any, Heats]]:
    """The winner, or None when no choice `holds` beside the default; and all that was measured.

    Successive halving: all run once beside the default, the better half twice more, and so on; the one that is left
    runs `MOST_ROUNDS` times. It is accepted if it loses on no trace; else the next best is asked. The order alternates
    from round to round. ``run(choice, trace, round)`` gives seconds. Stops at the ``deadline`` of ``clock``: then it
    goes by what there is, if that is `LEAST_ROUNDS`.
    """
    heats = {choice: Heats() for choice in choices}

    def round_of(group: Sequence[Any]) -> bool:
        for trace in traces:
            if clock() > deadline:
                return False
            order = [default, *group]
            number = len(heats[group[0]].pairs.get(trace, ()))
            if number % 2:
                order.reverse()
            took = {choice: run(choice, trace, number) for choice in order}
            for choice in group:
                heats[choice].pairs.setdefault(trace, []).append((took[default], took[choice]))
            tick(f"{len(group)} left, {geometric_mean([heats[one].mean for one in group]):.2f} x")
        return True

    alive, rounds, going = list(choices), 1, True
    while going and len(alive) > 1:
        for _ in range(rounds):
            going = going and round_of(alive)
        alive.sort(key=lambda choice: -_standing(heats[choice]))
        alive = alive[:(len(alive) + 1) // 2]
        rounds *= 2
    for choice in [*alive, *sorted(set(choices) - set(alive), key=lambda one: -_standing(heats[one]))]:
        while heats[choice].rounds < MOST_ROUNDS and round_of([choice]):
            if heats[choice].rounds >= LEAST_ROUNDS and heats[choice].worst < 0.95:
                break  # it will not recover
        if heats[choice].holds:
            return choice, heats
    return None, heats


def _standing(heats: Heats) -> float:
    """The mean, and what the worst trace lacks."""
    return heats.mean + 3 * min(0.0, heats.worst - 1) if heats.pairs else 0.0
