"""Accounts, transactions and the eight rules of card screening, drawn at random. `fraud.text` writes them as text."""
import random
from dataclasses import dataclass, replace

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.names import Deck

PATTERNS = {  # reason code -> the broken rule in words
    "R01": "device was removed from the account",
    "R02": "city is neither home nor under a current travel notice",
    "R03": "merchant of a disputed payment",
    "R04": "merchant category blocked by the customer",
    "R05": "amount above the limit",
    "R06": "card reported lost",
    "R07": "amount of a declined attempt tried again",
    "R08": "user was removed from the account",
}
CATEGORIES = "food fuel travel hotel games casino crypto books music garden sport health".split()
DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
PAST_MARKS = (("approved", "settled"), ("approved", "settled"), ("approved", "disputed"), ("declined", "settled"))


@dataclass(frozen=True)
class Payment:
    """A past payment of an account."""
    day: str
    city: str
    amount: str
    merchant: str
    status: str = ""  # approved or declined
    claim: str = ""   # settled or disputed


@dataclass(frozen=True)
class Account:
    """Profile and payment history of an account, the facts known before a transaction is judged.

    Pairs are (in force, no longer or never in force).
    """
    number: str
    limit: str
    card: tuple[str, str]
    device: tuple[str, str]
    user: tuple[str, str]
    category: tuple[str, str]
    home: str
    travel: tuple[str, str]
    history: tuple[Payment, ...]
    layout: int                   # seed for the order in which lines and pairs are written

    @property
    def declined(self) -> Payment:
        """Payment of the history that was declined."""
        return next(row for row in self.history if row.status == "declined")

    @property
    def disputed(self) -> Payment:
        """Payment of the history that the customer disputed."""
        return next(row for row in self.history if row.claim == "disputed")

    @property
    def sound(self) -> list[Payment]:
        """Payments of the history that were neither declined nor disputed."""
        return [row for row in self.history if row not in (self.declined, self.disputed)]


@dataclass(frozen=True)
class Transaction(Payment):
    """Transaction of an account to judge: a payment with its card, device, user and category."""
    card: str = ""
    device: str = ""
    user: str = ""
    category: str = ""


def draw_account(deck: Deck) -> Account:
    """Draw an account with four recent payments: one declined, one disputed, two sound; each of its cities occurs."""
    rng, cities = deck.rng, [deck.name("city") for _ in range(3)]
    limit = deck.number(300, 800)
    amounts, rows = (limit,), []
    for day, marks, city in zip(rng.sample(DAYS, 4), PAST_MARKS, rng.sample([*cities, rng.choice(cities)], 4)):
        amounts += (deck.number(100, int(limit[0]) * 100, unlike=amounts),)
        rows.append(Payment(day, city, amounts[-1], deck.name("merchant"), *marks))
    return Account(number=deck.number(10_000, 100_000), limit=limit, card=(deck.code(), deck.code()),
                   device=(deck.code(), deck.code()), user=(deck.name("person"), deck.name("person")),
                   category=tuple(rng.sample(CATEGORIES, 2)), home=cities[0], travel=(cities[1], cities[2]),
                   history=tuple(rows), layout=rng.randrange(2 ** 32))


def draw_transaction(deck: Deck, account: Account, broken: set[str]) -> Transaction:
    """Draw a transaction that breaks exactly the rules in `broken`. R05 and R07 exclude each other."""
    unknown = broken - PATTERNS.keys()
    if unknown:
        raise UserError(f"unknown fraud pattern {', '.join(sorted(unknown))}: use {', '.join(PATTERNS)}")
    rng = deck.rng
    used = tuple(row.amount for row in account.history)

    merchant = (rng.choice([*account.sound, account.declined]).merchant if rng.random() < .6
                else deck.name("merchant"))
    amount = (rng.choice([*account.sound, account.disputed]).amount if rng.random() < .5
              else deck.number(100, int(account.limit[0]) * 100, unlike=used))
    if "R03" in broken:
        merchant = account.disputed.merchant
    if "R05" in broken:
        amount = deck.number(100 * int(account.limit[0]) + 100, 1000, unlike=used)
    if "R07" in broken:
        amount = account.declined.amount
    city = account.travel[1] if "R02" in broken else rng.choice([account.home, account.travel[0]])
    return Transaction(day=rng.choice(DAYS), city=city, amount=amount, merchant=merchant,
                       card=account.card["R06" in broken], device=account.device["R01" in broken],
                       user=account.user["R08" in broken], category=account.category["R04" in broken])


def draw_broken_rules(rng: random.Random, account: Account) -> set[str]:
    """Draw a set of rules for a transaction to break, each rule often: material for explanations."""
    broken = {rule for rule in PATTERNS if rule not in ("R05", "R07") and rng.random() < .4}
    amount = rng.choice(["R05", "R07", None])
    if amount == "R05" and account.limit[0] == "9":  # no three-digit amount is above 9xx
        amount = None
    return broken | {amount} - {None}


def legitimate_twin(account: Account, tx: Transaction, pattern: str) -> tuple[Account, Transaction]:
    """Make a fraud's legitimate twin: exchange two words of the account or of `tx`, which broke the rule `pattern`."""
    if pattern == "R05":  # the limit and the amount exchange their numbers
        return replace(account, limit=tx.amount), replace(tx, amount=account.limit)
    if pattern in ("R03", "R07"):  # a sound payment and the marked one exchange their marks
        field, marked = ("claim", account.disputed) if pattern == "R03" else ("status", account.declined)
        sound = account.sound[0]
        exchanged = {marked: replace(marked, **{field: getattr(sound, field)}),
                     sound: replace(sound, **{field: getattr(marked, field)})}
        return replace(account, history=tuple(exchanged.get(row, row) for row in account.history)), tx
    pair = {"R01": "device", "R02": "travel", "R04": "category", "R06": "card", "R08": "user"}[pattern]
    return replace(account, **{pair: getattr(account, pair)[::-1]}), tx
