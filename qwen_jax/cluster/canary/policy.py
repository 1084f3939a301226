"""Trying a new version on a share of the requests: who gets it, and when it is taken back or goes on.

A version is judged without labels, by three things that can be seen of every request: whether it failed, whether it
took longer than 99 % of the old version's, and, where the old version was asked as well, whether the two disagree. Each
is a coin with an unknown probability, tested by A. Wald's sequential probability ratio test (1945): after every request
the evidence for "bad" (probability ``bad``) over "fine" (probability ``fine``) is

    sum over requests of  log(bad / fine)              where it happened,
                          log((1 - bad) / (1 - fine))  where it did not,

and "bad" is believed once that reaches log((1 - missed) / false_alarm), "fine" once it falls to
log(missed / (1 - false_alarm)). It falls no further: a version that turns bad later is found as fast as one that begins
so. A version that is fine is then taken back with a probability of about ``false_alarm``, and of at most
``false_alarm * missed`` more for every request after the first verdict, however often one looks.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from dataclasses import dataclass, field
from random import Random

from qwen_jax.errors import UserError

RUNNING, TAKEN_BACK, PROMOTED = "running", "taken back", "promoted"
LATENCIES = 500  # of the old version, the last ones, of which the 99th percentile is taken
ENOUGH = 100  # of them, before anything is called slow


@dataclass(frozen=True)
class Limit:
    """The probability up to which a version is fine, and that from which it is bad; in between either may be said."""

    fine: float
    bad: float

    def __post_init__(self) -> None:
        if not 0 < self.fine < self.bad < 1:
            raise UserError(f"a limit is fine up to one probability and bad from a larger one, both between 0 and 1, "
                            f"and not {self.fine} and {self.bad}")


@dataclass(frozen=True)
class CanaryOptions:
    """
    Attributes:
      weights: shares of the requests, one after another; the last one is followed by promotion.
      requests: of the new version before the next share.
      shadowed: share of its requests that the old version is asked as well.
      failed, disagreed, slow: what is fine and what is bad. A version that is meant to answer otherwise will disagree:
        give it a larger ``disagreed``.
      false_alarm: probability that one of the three tests takes back a version that is fine; missed: that it lets a bad
        one pass.
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
            raise UserError(f"the shares of a canary grow, from more than 0 to 1 at most: not {self.weights}")
        if self.requests < 1 or not 0 <= self.shadowed <= 1 or not (0 < self.false_alarm < .5 and 0 < self.missed < .5):
            raise UserError("a canary needs at least one request for each share, a shadowed share of 0 to 1, and "
                            "probabilities of errors below 0.5")


class SequentialTest:
    """Of one probability. See the module.

    Attributes:
      verdict: None while it is open, then "fine" or "bad"; once bad, always bad.
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
    """One version on trial. Plain data; time and requests are the caller's.

    Attributes:
      name: of the version; salt of who gets it.
      state: RUNNING, TAKEN_BACK or PROMOTED; why: it was taken back, in a sentence.
      step: which of ``options.weights`` is in force; seen: requests of the new version since then; total: in all.
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
                      for name in _SAID}

    @property
    def weight(self) -> float:
        """Share of requests that get the new version."""
        if self.state != RUNNING:
            return float(self.state == PROMOTED)
        return self.options.weights[self.step]

    def gets(self, key: str) -> bool:
        """Whether whoever has this key (a user, or what is asked) gets the new version. The same answer every time, and
        who got it at one share also gets it at a larger one."""
        digest = hashlib.blake2b(f"{self.name}\0{key}".encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.weight * 2**64

    def shadows(self, rng: Random) -> bool:
        """Whether the old version is asked this request of the new one's as well."""
        return self.state == RUNNING and rng.random() < self.options.shadowed

    def old_answered(self, seconds: float) -> None:
        """A request of the old version, those of the new one that it was asked as well among them."""
        self._latencies.append(seconds)

    def new_answered(self, seconds: float, failed: bool, disagreed: bool | None = None) -> None:
        """A request of the new version. disagreed: with the old one, None where that was not asked."""
        if self.state != RUNNING:
            return
        self.seen += 1
        self.total += 1
        self.tests["failed"].add(failed)
        if disagreed is not None:
            self.tests["disagreed"].add(disagreed)
        if len(self._latencies) >= ENOUGH and not failed:
            self.tests["slow"].add(seconds > self._p99())
        for name, test in self.tests.items():
            if test.verdict == "bad":
                limit = getattr(self.options, name)
                self.state = TAKEN_BACK
                self.why = (f"{test.happened} of {test.seen} requests {_SAID[name]}: that is no longer the "
                            f"{limit.fine:.1%} that would be fine")
                return
        if self.seen >= self.options.requests and self._fine():
            self.step, self.seen = self.step + 1, 0
            if self.step == len(self.options.weights):
                self.state = PROMOTED

    def _fine(self) -> bool:
        """What nothing is known of counts as fine: nothing shadowed, or nothing to compare latencies with."""
        return all(test.verdict == "fine" or not test.seen for test in self.tests.values())

    def _p99(self) -> float:
        ordered = sorted(self._latencies)
        return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))]


_SAID = {"failed": "failed", "disagreed": "were answered otherwise by the old version",
         "slow": "took longer than 99 % of the old version's"}
