"""A generated day of payments to screen: when each arrives, what is asked, and what is right.

Payments come in the rhythm of a day that begins and ends at four in the morning, fewest then and most at four in the
afternoon, compressed into as many seconds as one likes. Many requests are exact repetitions of earlier ones, the recent
ones first (retries, several systems asking about one payment). In the afternoon the upstream system begins to use other
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

DRIFT = {"lost": "stolen", "removed": "unlinked", "deleted": "closed", "blocked": "banned"}
ACTIVE = 64      # accounts that pay now and then, at any moment
RECENT = 300.0   # new requests ago, on average, for the one that is repeated
NIGHT = 0.1      # the lowest rate, of the mean one


@dataclass(frozen=True)
class Day:
    """
    Attributes:
      seconds: for which the day lasts. rate: requests per second, on average over it.
      repeats: share of the requests that are exact repetitions of an earlier one.
      payments: of an account, on average, until its profile changes.
      frauds: share of the new requests that are fraudulent; each breaks one rule, all rules evenly often.
      drift_at: when the words change, as a share of the day; 1 for never.
      split: of names and amounts; a model is tried on "heldout".
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
            raise UserError("a day lasts some seconds, at some rate, with one payment of an account at least")
        if not (0 <= self.repeats < 1 and 0 <= self.frauds <= 1 and 0 <= self.drift_at <= 1):
            raise UserError("repeats, frauds and drift_at are shares: 0 to 1, and not everything repeats")


@dataclass(frozen=True)
class Screening:
    """A request about one payment, and what is right.

    Attributes:
      request: see `fraud_request`; drifted: whether it is in the new words. label: "fraud" or "legit". reason: R00 if
        legitimate. answer: what the assistant should say, in the old words.
    """

    request: dict[str, Any]
    label: str
    reason: str
    answer: str
    drifted: bool


@dataclass(frozen=True)
class Arrival:
    """``at``: seconds since the day began; ``repeats``: whether it was asked before, letter by letter."""

    at: float
    screening: Screening
    repeats: bool


def day(options: Day) -> list[Arrival]:
    """In order of arrival. The same options, the same day, on every machine."""
    times = arrival_times(random.Random(f"times {options.seed}"), options.seconds, options.rate)
    return asked(options, times)


def asked(options: Day, times: Iterable[float]) -> list[Arrival]:
    """What is asked at these times, ascending; ``options.rate`` has no say in it."""
    rng, drift = random.Random(f"asked {options.seed} {options.split}"), options.drift_at * options.seconds
    before = screenings(options.seed, options.split, options.frauds, options.payments)
    after = screenings(options.seed + 1, options.split, options.frauds, options.payments, DRIFT)
    recent: deque[Screening] = deque(maxlen=int(20 * RECENT))
    found = []
    for at in times:
        repeats = bool(recent) and rng.random() < options.repeats
        if repeats:
            screening = recent[-1 - min(int(rng.expovariate(1 / RECENT)), len(recent) - 1)]
        else:
            screening = next(before if at < drift else after)
            recent.append(screening)
        found.append(Arrival(at, screening, repeats))
    return found


def arrival_times(rng: random.Random, seconds: float, rate: float) -> list[float]:
    """Of a Poisson process whose rate is a wave over the day: lowest where it begins and ends, highest halfway."""
    times, at, most = [], 0.0, rate * (2 - NIGHT)
    while (at := at + rng.expovariate(most)) < seconds:  # thinned: Lewis and Shedler, 1979
        if rng.random() * most < rate * (1 - (1 - NIGHT) * math.cos(2 * math.pi * at / seconds)):
            times.append(at)
    return times


def screenings(seed: int, split: str, frauds: float, payments: float,
               words: Mapping[str, str] | None = None) -> Iterator[Screening]:
    """Endless new payments of accounts that take turns; each account has ``payments`` of them, on average."""
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
        except IndexError:  # every beginning of a name has been used: this account is done
            deck = Deck(rng, split)
            active[place] = deck, draw_account(deck)
            continue
        yield Screening(request_of(account, tx, words), "fraud" if pattern else "legit", pattern or "R00",
                        answer(account, tx, pattern), bool(words))


def write_training(path: str | Path, count: int, seed: int = 0, drifted: float = 0.6) -> None:
    """Conversations for ``qwen-jax train``, in names that no tested one has: a share in the new words, and the rest in
    the old ones, lest these are forgotten.

    Half of them ask for a verdict, and as many of the payments are fraudulent. The others ask for an explanation, which
    says much more of what a word means: always in the old words, those that the model's verdicts rest on.
    """
    rng = random.Random(f"training {seed}")
    verdicts = [screenings(seed, "train", 0.5, 1.0), screenings(seed + 1, "train", 0.5, 1.0, DRIFT)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            new = rng.random() < drifted
            if number % 2:
                one = next(verdicts[new])
                asked, said = messages_of(one.request), one.answer
            else:
                deck = Deck(rng, "train")
                account = draw_account(deck)
                tx = draw_transaction(deck, account, draw_broken_rules(rng, account))
                asked = messages_of(request_of(account, tx, DRIFT if new else None), EXPLAIN)
                said = explanation(account, tx)
            file.write(json.dumps({"messages": [*asked, {"role": "assistant", "content": said}]}) + "\n")
