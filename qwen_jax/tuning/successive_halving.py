"""Race of a few tuning choices against the default, by successive halving."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any

MIN_ROUNDS = 3  # rounds that a decision needs
MAX_ROUNDS = 9  # rounds of the last comparison
# A choice does not lose on a trace if its median and lower quartile of (default's seconds / its own) are at least:
MIN_MEDIAN, MIN_QUARTILE = 0.99, 0.95
MIN_GAIN = 1.02  # mean ratio over all traces for which a change is worth it


@dataclass
class PairedTimings:
    """Measured times of one candidate setting: per trace and repetition a pair (default's, candidate's seconds)."""

    pairs: dict[Any, list[tuple[float, float]]] = field(default_factory=dict)

    def ratio(self, trace: Any) -> float:
        """Return the speed-up on a trace: the median over rounds of the default's seconds / the choice's own."""
        return median(self._ratios(trace))

    def _ratios(self, trace: Any) -> list[float]:
        return sorted(default / own for default, own in self.pairs[trace])

    @property
    def holds(self) -> bool:
        """True if the timings show that the choice is faster than the default over all traces, and slower on none."""
        quartiles = [ratios[len(ratios) // 4] for ratios in map(self._ratios, self.pairs)]
        return self.rounds >= MIN_ROUNDS and self.mean >= MIN_GAIN and self.worst >= MIN_MEDIAN and (
            min(quartiles) >= MIN_QUARTILE)

    @property
    def mean(self) -> float:
        """Geometric mean over the traces of the choice's speed-up over the default."""
        return geometric_mean([self.ratio(trace) for trace in self.pairs])

    @property
    def worst(self) -> float:
        """Smallest speed-up over the default among the traces."""
        return min(self.ratio(trace) for trace in self.pairs)

    @property
    def rounds(self) -> int:
        """Number of rounds in which the choice has been timed on every trace."""
        return min(map(len, self.pairs.values()), default=0)


def race(default: Any, choices: Sequence[Any], traces: Sequence[Any], run: Callable[[Any, Any, int], float],
         deadline: float, clock: Callable[[], float] = time.monotonic, tick: Callable[[str], None] = lambda _: None
         ) -> tuple[Any | None, dict[Any, PairedTimings]]:
    """Time choices against the default; return the fastest that `holds`, or None, and the timings of every choice.

    Successive halving: every choice runs once beside the default, the better half twice more, and so on; the last
    choice runs up to `MAX_ROUNDS` times. It wins if it is slower on no trace; else the next best choice runs as often.
    The order of choices alternates from round to round.

    run: ``run(choice, trace, round)`` returns seconds. deadline: time of ``clock`` after which no run starts; the
    decision then rests on the rounds so far, if they are at least `MIN_ROUNDS`. tick receives a text after every trace.
    """
    timings = {choice: PairedTimings() for choice in choices}

    def run_round(group: Sequence[Any]) -> bool:
        """Time the default and a group of choices once on every trace. Return False if the deadline came first."""
        for trace in traces:
            if clock() > deadline:
                return False
            order = [default, *group]
            number = len(timings[group[0]].pairs.get(trace, ()))
            if number % 2:
                order.reverse()
            took = {choice: run(choice, trace, number) for choice in order}
            for choice in group:
                timings[choice].pairs.setdefault(trace, []).append((took[default], took[choice]))
            tick(f"{len(group)} left, {geometric_mean([timings[choice].mean for choice in group]):.2f} x")
        return True

    def rank(choice: Any) -> float:
        return -_score(timings[choice])

    alive, rounds, going = list(choices), 1, True
    while going and len(alive) > 1:
        for _ in range(rounds):
            going = going and run_round(alive)
        alive.sort(key=rank)
        alive = alive[:(len(alive) + 1) // 2]
        rounds *= 2
    for choice in [*alive, *sorted(set(choices) - set(alive), key=rank)]:
        while timings[choice].rounds < MAX_ROUNDS and run_round([choice]):
            if timings[choice].rounds >= MIN_ROUNDS and timings[choice].worst < 0.95:
                break  # further rounds cannot make up for such a loss
        if timings[choice].holds:
            return choice, timings
    return None, timings


def _score(timings: PairedTimings) -> float:
    """Return the mean speed-up of a choice, less a penalty when a trace gets slower: the higher the better."""
    return timings.mean + 3 * min(0.0, timings.worst - 1) if timings.pairs else 0.0
