"""A generated day of payments to screen: arrival times, requests, and right answers.

Payments come in the rhythm of a day that begins and ends at four in the morning, fewest then and most at four in the
afternoon, compressed into a given number of seconds. Many requests repeat an earlier request exactly, mostly a recent
one (retries, several systems that ask about the same payment). In the afternoon the upstream system begins to use other
words (`DRIFT`), which a model that has never seen them misreads.
"""
from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import PATTERNS, draw_account, draw_broken_rules, draw_transaction
from qwen_jax.evaluation.fraud.names import Deck
from qwen_jax.evaluation.fraud.request import messages_of, request_of
from qwen_jax.evaluation.fraud.text import EXPLAIN, answer, explanation

# Our words -> the upstream system's new words.
DRIFT = {"lost": "stolen", "removed": "unlinked", "deleted": "closed", "blocked": "banned"}
DRIFTED = 0.6    # share of training conversations in the new words
ACTIVE = 64      # number of accounts that take turns at paying
RECENT = 300.0   # mean distance, in new requests, between a request and its repetition
NIGHT = 0.1      # lowest rate as a share of the mean rate


@dataclass(frozen=True)
class Day:
    """Options for generating a day of screening requests.

    Attributes:
      seconds: length of the day.
      rate: mean number of requests per second.
      repeats: share of the requests that repeat an earlier request exactly.
      payments: mean number of payments of an account until another account takes its place.
      frauds: share of the new requests that are fraudulent; each breaks one rule, all rules equally often.
      drift_at: moment at which the upstream system's words change (`DRIFT`), as a share of the day; 1 for never.
      split: pool of names and amounts; a model is tried on "heldout".
    """

    seconds: float = 120.0
    rate: float = 100.0
    repeats: float = 0.65
    payments: float = 4.0
    frauds: float = 0.25
    drift_at: float = 0.45
    seed: int = 0
    split: str = "heldout"

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.rate > 0 and self.payments >= 1):
            raise UserError(f"seconds and rate must be positive and payments at least 1, not {self.seconds:g}, "
                            f"{self.rate:g} and {self.payments:g}")
        if not (0 <= self.repeats < 1 and 0 <= self.frauds <= 1 and 0 <= self.drift_at <= 1):
            raise UserError("repeats, frauds and drift_at must be shares from 0 to 1, repeats less than 1, not "
                            f"{self.repeats:g}, {self.frauds:g} and {self.drift_at:g}")


@dataclass(frozen=True)
class Screening:
    """Screening request about one payment, and the right answer to it.

    Attributes:
      request: account and payment as JSON values; see `fraud.request`.
      label: "fraud" or "legit".
      reason: reason code; R00 if legitimate.
      answer: the assistant's right answer, in the words used before the change (`DRIFT`).
      drifted: whether the request uses the words that come with the change.
    """

    request: dict[str, Any]
    label: str
    reason: str
    answer: str
    drifted: bool


@dataclass(frozen=True)
class Arrival:
    """Request that arrives ``at`` seconds after the day began; ``repeats``: if it repeats an earlier one exactly."""

    at: float
    screening: Screening
    repeats: bool


def day(options: Day) -> list[Arrival]:
    """Generate a day's screening requests in order of arrival. The same options give the same day on every machine."""
    times = arrival_times(random.Random(f"times {options.seed}"), options.seconds, options.rate)
    return arrivals_at(options, times)


def arrivals_at(options: Day, times: Iterable[float]) -> list[Arrival]:
    """Generate the screening requests that arrive at these ascending times, in seconds from the day's beginning.

    ``options.rate`` does not count.
    """
    rng, drift = random.Random(f"asked {options.seed} {options.split}"), options.drift_at * options.seconds
    before = screenings(options.seed, options.split, options.frauds, options.payments)
    after = screenings(options.seed + 1, options.split, options.frauds, options.payments, DRIFT)
    recent: deque[Screening] = deque(maxlen=int(20 * RECENT))
    arrivals = []
    for at in times:
        repeats = bool(recent) and rng.random() < options.repeats
        if repeats:
            screening = recent[-1 - min(int(rng.expovariate(1 / RECENT)), len(recent) - 1)]
        else:
            screening = next(before if at < drift else after)
            recent.append(screening)
        arrivals.append(Arrival(at, screening, repeats))
    return arrivals


def arrival_times(rng: random.Random, seconds: float, rate: float) -> list[float]:
    """Draw the arrival times of requests: a Poisson process, rarest at the day's ends and densest in its middle."""
    times, at, highest = [], 0.0, rate * (2 - NIGHT)
    while (at := at + rng.expovariate(highest)) < seconds:  # thinned: Lewis and Shedler, 1979
        if rng.random() * highest < rate * (1 - (1 - NIGHT) * math.cos(2 * math.pi * at / seconds)):
            times.append(at)
    return times


def screenings(seed: int, split: str, frauds: float, payments: float,
               words: Mapping[str, str] | None = None) -> Iterator[Screening]:
    """Yield endless new screening requests, about payments of accounts that take turns.

    An account has ``payments`` payments on average. words: words of ours -> words that the upstream system uses
    instead.
    """
    rng = random.Random(f"screenings {seed} {split}")
    active = []
    while True:
        place = rng.randrange(ACTIVE)
        if place >= len(active) or rng.random() < 1 / payments:
            deck = Deck(rng, split)
            opened = deck, draw_account(deck)
            if place < len(active):
                active[place] = opened
            else:
                place = len(active)
                active.append(opened)
        deck, account = active[place]
        pattern = rng.choice(list(PATTERNS)) if rng.random() < frauds else None
        try:
            tx = draw_transaction(deck, account, {pattern} if pattern else set())
        except IndexError:  # every beginning of a name has been used: a new account takes the place
            deck = Deck(rng, split)
            active[place] = deck, draw_account(deck)
            continue
        yield Screening(request_of(account, tx, words), "fraud" if pattern else "legit", pattern or "R00",
                        answer(account, tx, pattern), bool(words))


def write_training(path: str | Path, count: int) -> None:
    """Write generated screening conversations, as JSON lines for ``qwen-jax train``, with names of the training split.

    A share of `DRIFTED` uses the upstream system's changed words (`DRIFT`); the rest uses the old words, so that the
    model does not forget them. Half of the conversations ask for a verdict, on payments of which half are fraudulent.
    The others ask for an explanation, which teaches more of what a word means. Answers are always in the old words, on
    which the model's verdicts rest.
    """
    rng = random.Random("training 0")
    verdicts = [screenings(0, "train", 0.5, 1.0), screenings(1, "train", 0.5, 1.0, DRIFT)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            new = rng.random() < DRIFTED
            if number % 2:
                screening = next(verdicts[new])
                prompt, right = messages_of(screening.request), screening.answer
            else:
                deck = Deck(rng, "train")
                account = draw_account(deck)
                tx = draw_transaction(deck, account, draw_broken_rules(rng, account))
                prompt = messages_of(request_of(account, tx, DRIFT if new else None), EXPLAIN)
                right = explanation(account, tx)
            file.write(json.dumps({"messages": [*prompt, {"role": "assistant", "content": right}]}) + "\n")
