"""Which queued requests move between replicas when their queues have become uneven."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from qwen_jax.errors import UserError


class Move(NamedTuple):
    """``count`` queued requests go from the replica with index ``source`` to the one with index ``target``."""

    source: int
    target: int
    count: int


def rebalance_load(loads: Sequence[int]) -> list[Move]:
    """The moves that bring queues closer to their mean.

    Each replica under 0.9 x mean takes, in order of index, ``min(0.3 x deficit, donor - mean)`` requests, rounded down,
    from the replica that is the largest at that moment (the first of several). A deficit is what a replica lacks to the
    mean. The donor is the smaller by every move, so no donor gets below the mean and no taker above it, however many
    take. Only 0.3 of a deficit moves at once because loads are old when they are read: what is missing still moves in
    the next rounds. Rounds end by themselves: deficits of 3 and less move nothing.

    Args:
      loads: per replica, the requests in its queue. Those that run have their keys and values there and stay.

    Returns the moves, none of them of nothing, to be made in this order. Raises UserError for a load that is not a
    whole number of at least 0.
    """
    loads = [_checked(load) for load in loads]
    count, total = len(loads), sum(loads)
    moves = []
    # In whole numbers, everything times `count`: mean = total / count need not be one.
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
        raise UserError(f"a load is a number of queued requests, 0 or more, and not {load!r}")
    return number
