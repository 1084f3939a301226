"""Simple routing policies that `choose` is compared with. They are called like `qwen_jax.cluster.routing.policies`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from random import Random

from qwen_jax.cluster.routing.policies import ReplicaView, accepting, pick_two


def random_choice(views: Sequence[ReplicaView], prompt_blocks: Sequence[Hashable], rng: Random) -> str | None:
    """Return the name of a random replica."""
    candidates = accepting(views)
    return rng.choice(candidates).name if candidates else None


class RoundRobin:
    """A routing policy that picks the replicas in turn. It remembers the last one: use a new object per simulation."""

    def __init__(self) -> None:
        self._turn = -1

    def __call__(self, views: Sequence[ReplicaView], prompt_blocks: Sequence[Hashable], rng: Random) -> str | None:
        for _ in views:
            self._turn = (self._turn + 1) % len(views)
            if views[self._turn].accepting:
                return views[self._turn].name
        return None


def two_choices(views: Sequence[ReplicaView], prompt_blocks: Sequence[Hashable], rng: Random) -> str | None:
    """Return the name of the replica with fewer requests of two random ones."""
    candidates = pick_two(accepting(views), rng)
    return min(candidates, key=lambda view: view.requests).name if candidates else None


def least_loaded(views: Sequence[ReplicaView], prompt_blocks: Sequence[Hashable], rng: Random) -> str | None:
    """Return the name of the replica with the fewest requests, or of a random one of several such replicas."""
    candidates = accepting(views)
    fewest = min((view.requests for view in candidates), default=0)
    return random_choice([view for view in candidates if view.requests == fewest], prompt_blocks, rng)
