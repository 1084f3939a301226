"""The rule by which queued requests move between replicas whose queues have become uneven."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from qwen_jax.errors import UserError


class Move(NamedTuple):
    """A move of ``count`` queued requests between replicas, which are given by index."""

    source: int
    target: int
    count: int


def rebalance_load(loads: Sequence[int]) -> list[Move]:
    """Return the moves of queued requests that bring the replicas' queues closer to their mean, in order.

    Each replica under 0.9 x mean takes, in order of index, ``min(0.3 x deficit, donor - mean)`` requests, rounded down,
    from the replica with the longest queue at that moment (the first of several). The deficit is what a replica lacks
    to the mean. Loads are updated after every move, so that no donor gets below the mean and no taker above it, however
    many replicas take. Only 0.3 of a deficit moves at once because loads are old when they are read: the rest moves in
    the next rounds. Rounds end by themselves: deficits of 3 and less move nothing.

    Args:
      loads: the number of queued requests of each replica. Running requests do not count: they stay with their keys
        and values.

    Raises:
      UserError: a load is not an integer of at least 0.
    """
    loads = [_checked(load) for load in loads]
    count, total = len(loads), sum(loads)
    moves = []
    # In integers, with everything multiplied by `count`, because the mean, total / count, need not be an integer.
    for target in range(count):
        deficit = total - count * loads[target]
        if 10 * deficit <= total:  # at least 0.9 x mean
            continue
        source = max(range(count), key=loads.__getitem__)
        moved = min(3 * deficit // (10 * count), (count * loads[source] - total) // count)
        if moved:
            loads[source] -= moved
            loads[target] += moved
            moves.append(Move(source, target, moved))
    return moves


def _checked(load: int) -> int:
    try:
        number = -1 if isinstance(load, bool) else operator.index(load)
    except TypeError:
        number = -1
    if number < 0:
        raise UserError(f"a load must be a number of queued requests, an integer of 0 or more, not {load!r}")
    return number
