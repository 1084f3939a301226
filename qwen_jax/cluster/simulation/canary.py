"""Requests for `Canary` as they might come: what a bad version is found by, and how often a good one is called bad."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from qwen_jax.cluster.canary.policy import RUNNING, Canary, CanaryOptions


@dataclass(frozen=True)
class Version:
    """How a new version differs from the old one.

    Attributes:
      failed: share of its requests. disagreed: share of the others that the old version answers otherwise: an accuracy
        that is 10 points lower is at least .1. slower: factor of its latencies.
    """

    failed: float = 0.002
    disagreed: float = 0.005
    slower: float = 1.0


DEFAULT = CanaryOptions()


def simulate(version: Version, seed: int, requests: int = 20_000, options: CanaryOptions = DEFAULT) -> Canary:
    """A trial of at most so many requests, of both versions together.

    Latencies are log-normal (p99 about 5 times the median), times a load that both versions share and that wanders
    slowly between about a half and twice.
    """
    rng, canary, load = Random(seed), Canary(f"v{seed}", options), 0.0
    for _ in range(requests):
        load += -0.01 * load + rng.gauss(0, 0.05)
        latency = math.exp(rng.gauss(0, 0.7) + load) * 0.05
        if not canary.gets(f"user {rng.randrange(10_000)}"):
            canary.old_answered(latency)
            continue
        failed = rng.random() < version.failed
        shadowed = canary.shadows(rng)
        if shadowed:
            canary.old_answered(math.exp(rng.gauss(0, 0.7) + load) * 0.05)
        canary.new_answered(latency * version.slower, failed,
                            rng.random() < version.disagreed if shadowed and not failed else None)
        if canary.state != RUNNING:
            break
    return canary
