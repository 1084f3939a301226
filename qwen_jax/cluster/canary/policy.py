"""Statistics of a trial: which requests get a new version, and when it is taken back or gets a larger share.

A version is judged without labels, by three events that can be seen in every request: it failed, it took longer than
99 % of the old version's requests, or its answer differs from the old version's, where that was asked as well. Each
event has an unknown probability, which is tested by A. Wald's sequential probability ratio test (1945): after every
request the evidence for "bad" (probability ``bad``) over "fine" (probability ``fine``) is

    sum over requests of  log(bad / fine)              where the event happened,
                          log((1 - bad) / (1 - fine))  where it did not,

and the verdict is "bad" once that reaches log((1 - missed) / false_alarm), and "fine" once it falls to
log(missed / (1 - false_alarm)). It falls no further, so a version that turns bad later is found as fast as a version
that begins so. A version that is fine is then taken back with a probability of about ``false_alarm``, and of at most
``false_alarm * missed`` more for every request after the first verdict, however often the verdict is looked at.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from dataclasses import dataclass, field
from random import Random

from qwen_jax.errors import UserError

RUNNING, TAKEN_BACK, PROMOTED = "running", "taken back", "promoted"
LATENCIES = 500  # last latencies of the old version, of which the 99th percentile is taken
MIN_LATENCIES = 100  # fewer latencies than this say nothing about slowness


@dataclass(frozen=True)
class Limit:
    """Limits for how often an event, such as an error, may happen: a version is fine up to the probability ``fine`` and
    bad from ``bad`` on; in between either verdict may come."""

    fine: float
    bad: float

    def __post_init__(self) -> None:
        if not 0 < self.fine < self.bad < 1:
            raise UserError("fine and bad must be probabilities between 0 and 1, fine the smaller one, not "
                            f"{self.fine} and {self.bad}")


@dataclass(frozen=True)
class CanaryOptions:
    """Settings of a trial: the growing shares of the requests that a new version gets, and when it is taken back.

    Attributes:
      weights: growing shares of the requests that the new version gets; the last share is followed by promotion.
      requests: number of requests of the new version before the next share.
      shadowed: share of the new version's requests that the old version is asked as well.
      failed: limit for requests that fail.
      disagreed: limit for answers that differ from the old version's. A version that is meant to answer otherwise needs
        a larger one.
      slow: limit for requests that take longer than 99 % of the old version's.
      false_alarm: probability that one of the three tests takes back a version that is fine.
      missed: probability that one of the three tests lets a bad version pass.
    """

    weights: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    requests: int = 300
    shadowed: float = 1.0
    failed: Limit = Limit(0.01, 0.06)
    disagreed: Limit = Limit(0.01, 0.08)
    slow: Limit = Limit(0.04, 0.25)
    false_alarm: float = 0.001
    missed: float = 0.01

    def __post_init__(self) -> None:
        if not self.weights or list(self.weights) != sorted(set(self.weights)) or not 0 < self.weights[0] <= 1 or (
                self.weights[-1] > 1):
            raise UserError(f"weights must be growing shares of more than 0 and at most 1, not {self.weights}")
        if self.requests < 1:
            raise UserError(f"requests must be 1 or more, not {self.requests}")
        if not 0 <= self.shadowed <= 1:
            raise UserError(f"shadowed must be a share of 0 to 1, not {self.shadowed}")
        if not (0 < self.false_alarm < .5 and 0 < self.missed < .5):
            raise UserError("false_alarm and missed must be probabilities between 0 and 0.5, not "
                            f"{self.false_alarm} and {self.missed}")


class SequentialTest:
    """Wald's sequential test of whether an event, such as an error, is too frequent in a new version's requests.

    Attributes:
      evidence: sum of the logarithms of the likelihood ratios, not below the bound for "fine".
      seen: number of requests.
      happened: number of requests with the event.
      verdict: None while the test is open, then "fine" or "bad"; once bad, always bad.
    """

    def __init__(self, limit: Limit, false_alarm: float, missed: float) -> None:
        self._yes, self._no = math.log(limit.bad / limit.fine), math.log((1 - limit.bad) / (1 - limit.fine))
        self._bad, self._fine = math.log((1 - missed) / false_alarm), math.log(missed / (1 - false_alarm))
        self.evidence, self.seen, self.happened = 0.0, 0, 0
        self.verdict: str | None = None

    def add(self, happened: bool) -> None:
        self.seen += 1
        self.happened += happened
        if self.verdict == "bad":
            return
        self.evidence = max(self.evidence + (self._yes if happened else self._no), self._fine)
        if self.evidence >= self._bad:
            self.verdict = "bad"
        elif self.evidence <= self._fine:
            self.verdict = "fine"


@dataclass
class Canary:
    """State of a trial of a new version. It measures no time and sends no requests: the caller reports them.

    Attributes:
      name: name of the new version. It is also hashed, so that other users get the next version.
      options: course and limits of the trial.
      state: RUNNING, TAKEN_BACK or PROMOTED.
      why: reason why the version was taken back, in a sentence.
      step: index of the share in ``options.weights`` that is in force.
      seen: number of requests of the new version at this share.
      total: number of requests of the new version at all shares.
      tests: the three sequential tests, by event.
    """

    name: str
    options: CanaryOptions = CanaryOptions()
    state: str = RUNNING
    why: str | None = None
    step: int = 0
    seen: int = 0
    total: int = 0
    tests: dict[str, SequentialTest] = field(init=False)
    _latencies: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=LATENCIES))

    def __post_init__(self) -> None:
        options = self.options
        self.tests = {name: SequentialTest(getattr(options, name), options.false_alarm, options.missed)
                      for name in _EVENTS}

    @property
    def weight(self) -> float:
        """Share of the requests that get the new version."""
        if self.state != RUNNING:
            return float(self.state == PROMOTED)
        return self.options.weights[self.step]

    def gets(self, key: str) -> bool:
        """Return true if requests with this key, a user or a prompt, get the new version.

        A key that gets the new version at one share also gets it at every larger one.
        """
        digest = hashlib.blake2b(f"{self.name}\0{key}".encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.weight * 2**64

    def shadows(self, rng: Random) -> bool:
        """Return true, at random, if the old version is to answer a request of the new version too, for comparison."""
        return self.state == RUNNING and rng.random() < self.options.shadowed

    def old_answered(self, seconds: float) -> None:
        """Record the latency of a request that the old version answered, for a client or for comparison."""
        self._latencies.append(seconds)

    def new_answered(self, seconds: float, failed: bool, disagreed: bool | None = None) -> None:
        """Record a request that the new version answered or failed, and move to the next share or end the trial if due.

        disagreed: true if its answer differs from the old version's; None if the old version was not asked.
        """
        if self.state != RUNNING:
            return
        self.seen += 1
        self.total += 1
        self.tests["failed"].add(failed)
        if disagreed is not None:
            self.tests["disagreed"].add(disagreed)
        if len(self._latencies) >= MIN_LATENCIES and not failed:
            self.tests["slow"].add(seconds > self._p99())
        for name, test in self.tests.items():
            if test.verdict == "bad":
                limit = getattr(self.options, name)
                self.state = TAKEN_BACK
                self.why = (f"{test.happened} of {test.seen} requests {_EVENTS[name]}: that is no longer the "
                            f"{limit.fine:.1%} that would be fine")
                return
        if self.seen >= self.options.requests and self._fine():
            self.step, self.seen = self.step + 1, 0
            if self.step == len(self.options.weights):
                self.state = PROMOTED

    def take_back(self, why: str) -> None:
        """End the trial, or the promotion, for a reason beside the tests."""
        self.state, self.why = TAKEN_BACK, why

    def _fine(self) -> bool:
        """Return true if each of the three tests says "fine" or has no data (the old version may be asked nothing)."""
        return all(test.verdict == "fine" or not test.seen for test in self.tests.values())

    def _p99(self) -> float:
        ordered = sorted(self._latencies)
        return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))]


_EVENTS = {"failed": "failed", "disagreed": "were answered otherwise by the old version",
           "slow": "took longer than 99 % of the old version's"}
