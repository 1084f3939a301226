"""Simulated trials of a `Canary`: how soon a bad version is taken back, and how often a good one is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from qwen_jax.cluster.canary.policy import RUNNING, Canary


@dataclass(frozen=True)
class Version:
    """Differences of a simulated new version from the old one.

    Attributes:
      failed: share of its requests that fail.
      disagreed: share of its other requests that the old version answers otherwise. An accuracy that is 10 points lower
        makes this at least 0.1.
      slower: factor of its latencies.
    """

    failed: float = 0.002
    disagreed: float = 0.005
    slower: float = 1.0


REQUESTS = 20_000


def simulate(version: Version, seed: int) -> Canary:
    """Simulate a trial of a new version until its verdict, for at most 20,000 requests to both versions together.

    Latencies are log-normal (p99 about 5 times the median), times a load that both versions share and that wanders
    slowly between about a half and twice.
    """
    rng, canary, load = Random(seed), Canary(f"v{seed}"), 0.0
    for _ in range(REQUESTS):
        load += -0.01 * load + rng.gauss(0, 0.05)
        latency = math.exp(rng.gauss(0, 0.7) + load) * 0.05
        if not canary.gets(f"user {rng.randrange(10_000)}"):
            canary.old_answered(latency)
            continue
        failed = rng.random() < version.failed
        shadowed = canary.shadows(rng)
        if shadowed:
            canary.old_answered(math.exp(rng.gauss(0, 0.7) + load) * 0.05)
        disagreed = rng.random() < version.disagreed if shadowed and not failed else None
        canary.new_answered(latency * version.slower, failed, disagreed)
        if canary.state != RUNNING:
            break
    return canary
