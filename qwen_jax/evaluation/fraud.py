"""Card-transaction screening: a generated task with a known answer.

A conversation holds an account profile, a few recent payments and one transaction to judge. The assistant answers
``fraud Rnn evidence`` or ``legit R00``. Ten rules can be broken, and a fraudulent transaction breaks exactly one.

Every fraudulent example has a legitimate **twin** made of the same words: two identifiers have exchanged their places
in the profile or the history (the trusted device and the removed one, the limit and the amount), so that the same
transaction is in order. Which words occur, and how often, says nothing; which word stands where decides. Each rule
joins a fact in the profile or the history with one in the transaction, usually more than a hundred tokens apart.

    python: generate(seed=0, split="heldout", count=4)  ->  [fraud, its twin, fraud, its twin]
"""
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud_names import SPLITS, Deck

SYSTEM = "Screen card payments. Answer fraud or legit, a reason code and the evidence."
LEGIT = "legit R00"
JUDGE, EXPLAIN, LIST = "Judge", "Explain", "List"
PATTERNS = {  # reason code -> what is wrong, in words
    "R01": "device was removed from the account",
    "R02": "city is neither home nor under a current travel notice",
    "R03": "merchant of a disputed payment",
    "R04": "merchant category blocked by the customer",
    "R05": "amount above the limit",
    "R06": "other city than a payment in the same hour",
    "R07": "amount of a declined attempt tried again",
    "R08": "card reported lost",
    "R09": "user was removed from the account",
    "R10": "terminal belongs to another merchant",
}
CATEGORIES = "food fuel travel hotel games casino crypto books music garden sport health".split()
ROWS = ("approved", "approved", "declined", "disputed")


@dataclass(frozen=True)
class Payment:
    hour: int
    minute: int
    merchant: str
    amount: str
    city: str
    terminal: str
    status: str = ""


@dataclass(frozen=True)
class Account:
    """What is known before the transaction. Pairs are (in force, no longer or never in force)."""
    number: str
    limit: str
    card: tuple[str, str]
    device: tuple[str, str]
    user: tuple[str, str]
    category: tuple[str, str]
    home: str
    travel: tuple[str, str]
    history: tuple[Payment, ...]
    layout: int  # seed of the order in which lines and pairs are written

    @property
    def hours(self) -> set[int]:
        return {row.hour % 10 for row in self.history}

    def row(self, status: str) -> Payment:
        return next(row for row in self.history if row.status == status)


@dataclass(frozen=True)
class Transaction(Payment):
    card: str = ""
    device: str = ""
    user: str = ""
    category: str = ""


@dataclass(frozen=True)
class Example:
    """One transaction to judge. `pattern` is the rule in question: broken in a fraud, kept in its legitimate twin."""
    messages: list[dict]  # system, user
    label: str            # "fraud" | "legit"
    reason: str           # "R00" when legitimate
    pattern: str          # "R01" … "R10"
    answer: str           # what the assistant should say


# ---- drawing accounts and transactions

def _hour(rng: random.Random, taken: set[int]) -> int:
    return rng.choice([hour for hour in range(24) if hour % 10 not in taken])  # last digits differ, so hours do


def draw_account(deck: Deck) -> Account:
    """An account with four recent payments: two approved, one declined, one disputed; each of its cities occurs."""
    rng, cities = deck.rng, [deck.name("city") for _ in range(3)]
    limit = deck.number(300, 800)
    hours, amounts, rows = set(), (limit,), []
    for status, city in zip(ROWS, rng.sample([*cities, rng.choice(cities)], 4)):
        amounts += (deck.number(100, int(limit[0]) * 100, unlike=amounts),)
        rows.append(Payment(_hour(rng, hours), rng.randrange(60), deck.name("merchant"), amounts[-1], city, deck.code(),
                            status))
        hours.add(rows[-1].hour % 10)
    return Account(deck.number(10_000, 100_000), limit, (deck.code(), deck.code()), (deck.code(), deck.code()),
                   (deck.name("person"), deck.name("person")), tuple(rng.sample(CATEGORIES, 2)), cities[0],
                   (cities[1], cities[2]), tuple(rows), rng.randrange(2 ** 32))


def draw_transaction(deck: Deck, account: Account, broken: set[str]) -> Transaction:
    """A transaction that breaks exactly these rules. R02 and R06, R03 and R10, R05 and R07 exclude each other."""
    unknown = broken - PATTERNS.keys()
    if unknown:
        raise UserError(f"unknown fraud pattern {', '.join(sorted(unknown))}: use {', '.join(PATTERNS)}")
    rng = deck.rng
    approved = [row for row in account.history if row.status == "approved"]
    used = tuple(row.amount for row in account.history)
    permitted = (account.home, account.travel[0])
    in_permitted = [row for row in account.history if row.city in permitted]

    row = rng.choice(approved + [account.row("declined")]) if rng.random() < .6 else None
    merchant, terminal = (row.merchant, row.terminal) if row else (deck.name("merchant"), deck.code())
    amount = (rng.choice(approved + [account.row("disputed")]).amount if rng.random() < .5
              else deck.number(100, int(account.limit[0]) * 100, unlike=used))
    city, hour = rng.choice(permitted), _hour(rng, account.hours)
    if rng.random() < .5:
        same_hour = rng.choice(in_permitted)
        city, hour = same_hour.city, same_hour.hour
    if "R02" in broken:
        city, hour = account.travel[1], _hour(rng, account.hours)
    if "R03" in broken:
        merchant, terminal = account.row("disputed").merchant, account.row("disputed").terminal
    if "R05" in broken:
        amount = deck.number(100 * int(account.limit[0]) + 100, 1000, unlike=used)
    if "R06" in broken:
        other = rng.choice(in_permitted)
        hour, city = other.hour, permitted[other.city == permitted[0]]
    if "R07" in broken:
        amount = account.row("declined").amount
    if "R10" in broken:
        row, other = rng.sample(approved + [account.row("declined")], 2)
        merchant, terminal = row.merchant, other.terminal
    return Transaction(hour, rng.randrange(60), merchant, amount, city, terminal, "", account.card["R08" in broken],
                       account.device["R01" in broken], account.user["R09" in broken],
                       account.category["R04" in broken])


def draw_broken_rules(rng: random.Random, account: Account) -> set[str]:
    """Any number of rules at once, each often: material for explanations."""
    broken = {rule for rule in ("R01", "R04", "R08", "R09") if rng.random() < .5}
    for rules in (("R02", "R06", None, None), ("R03", "R10", None), ("R05", "R07", None)):
        broken.add(rng.choice(rules))
    return broken - {None} - ({"R05"} if account.limit[0] == "9" else set())  # no three-digit amount is above 9xx


def legitimate_twin(account: Account, tx: Transaction, pattern: str) -> tuple[Account, Transaction]:
    """The same words with two of them exchanged, so that `tx`, which broke `pattern`, breaks nothing."""
    if pattern == "R05":  # the limit and the amount exchange their numbers
        return replace(account, limit=tx.amount), replace(tx, amount=account.limit)
    pair = {"R01": "device", "R02": "travel", "R04": "category", "R08": "card", "R09": "user"}.get(pattern)
    if pair:
        return replace(account, **{pair: getattr(account, pair)[::-1]}), tx
    if pattern in ("R03", "R07"):
        field = "status"
        first = account.row("disputed" if pattern == "R03" else "declined")
        second = next(row for row in account.history if row.status == "approved")
    elif pattern == "R06":
        field = "hour"
        first = next(row for row in account.history if row.hour == tx.hour)
        second = next(row for row in account.history if row.city == tx.city)
    else:  # R10
        field = "terminal"
        first = next(row for row in account.history if row.merchant == tx.merchant)
        second = next(row for row in account.history if row.terminal == tx.terminal)
    exchanged = {first: replace(first, **{field: getattr(second, field)}),
                 second: replace(second, **{field: getattr(first, field)})}
    return replace(account, history=tuple(exchanged.get(row, row) for row in account.history)), tx


# ---- writing them down

def _pair(rng: random.Random, names: tuple[str, str], values: tuple[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in rng.sample(list(zip(names, values)), 2))


def _payment(payment: Payment) -> str:
    status = f" {payment.status}" if payment.status else ""
    return (f"{payment.hour:02}:{payment.minute:02}{status} {payment.merchant} {payment.amount} {payment.city} "
            f"terminal {payment.terminal}")


def render_account(account: Account) -> str:
    rng = random.Random(account.layout)
    lines = [f"Limit {account.limit}", "Card " + _pair(rng, ("active", "lost"), account.card),
             "Device " + _pair(rng, ("trusted", "removed"), account.device),
             "User " + _pair(rng, ("added", "deleted"), account.user),
             f"Home {account.home}", "Travel " + _pair(rng, ("notice", "ended"), account.travel),
             "Category " + _pair(rng, ("allowed", "blocked"), account.category)]
    rng.shuffle(lines)
    history = sorted(account.history, key=lambda row: (row.hour, row.minute))
    return "\n".join([f"Account {account.number}", *lines, *["History"] * bool(history), *map(_payment, history)])


def render_transaction(tx: Transaction, request: str = JUDGE) -> str:
    return f"{request}\n{_payment(tx)} card {tx.card} device {tx.device} user {tx.user} category {tx.category}"


def evidence(account: Account, tx: Transaction, pattern: str) -> str:
    """The two facts that contradict each other."""
    if pattern == "R06":
        return f"city {next(row.city for row in account.history if row.hour == tx.hour)} not {tx.city}"
    if pattern == "R10":
        own = next(row.terminal for row in account.history if row.merchant == tx.merchant)
        return f"terminal {own} not {tx.terminal}"
    return {"R01": f"device {tx.device} removed", "R02": f"city {tx.city} ended",
            "R03": f"merchant {tx.merchant} disputed", "R04": f"category {tx.category} blocked",
            "R05": f"amount {tx.amount} limit {account.limit}", "R07": f"amount {tx.amount} declined",
            "R08": f"card {tx.card} lost", "R09": f"user {tx.user} deleted"}[pattern]


def answer(account: Account, tx: Transaction, pattern: str | None) -> str:
    return LEGIT if pattern is None else f"fraud {pattern} {evidence(account, tx, pattern)}"


def explanation(account: Account, tx: Transaction) -> str:
    """What each field of the transaction is, one after another: the answer when the user says ``Explain``."""
    def standing(kind: str, names: tuple[str, str]) -> str:
        return f"{kind} {names[getattr(account, kind).index(getattr(tx, kind))]}"

    cities = {account.home: "home", account.travel[0]: "notice", account.travel[1]: "ended"}
    merchants = {row.merchant: row.status for row in account.history}
    terminals = {row.terminal: row.merchant for row in account.history}
    amounts = {row.amount: row.status for row in account.history}
    same_hour = {row.hour: row.city for row in account.history}.get(tx.hour)
    return " ".join([
        standing("card", ("active", "lost")), standing("device", ("trusted", "removed")),
        standing("user", ("added", "deleted")), standing("category", ("allowed", "blocked")), f"city {cities[tx.city]}",
        f"hour {'free' if same_hour is None else 'same' if same_hour == tx.city else 'elsewhere'}",
        f"merchant {merchants.get(tx.merchant, 'new')}",
        f"terminal {'own' if terminals.get(tx.terminal, tx.merchant) == tx.merchant else 'foreign'}",
        f"amount {amounts.get(tx.amount, 'new')}",
        f"limit {'over' if int(tx.amount) > int(account.limit) else 'under'}"])


def listing(account: Account, rng: random.Random) -> str:
    """Every identifier of the profile and the history, each followed by its standing, in random order."""
    items = [f"{name} {standing}" for kind, standings in
             (("card", ("active", "lost")), ("device", ("trusted", "removed")), ("user", ("added", "deleted")),
              ("category", ("allowed", "blocked")), ("travel", ("notice", "ended")))
             for name, standing in zip(getattr(account, kind), standings)]
    items.append(f"{account.home} home")
    for row in account.history:
        items += [f"{row.merchant} {row.status}", f"{row.amount} {row.status}", f"{row.terminal} {row.merchant}",
                  f"{row.hour:02} {row.city}"]
    rng.shuffle(items)
    return " ".join(items)


def _opening(account: Account, request: str) -> list[dict]:
    return [{"role": "system", "content": SYSTEM},
            {"role": "user", "content": render_account(account) + "\n" + request}]


# ---- examples

def _rng(seed: int, split: str, purpose: str) -> random.Random:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    return random.Random(f"{purpose} {seed} {split}")


def generate(seed: int, split: str, count: int) -> list[Example]:
    """`count` examples, half of them fraudulent; examples 2i and 2i + 1 are twins. Patterns take turns.

    Same arguments, same examples, on every machine. Splits share no account number, name, code or amount.
    """
    rng, examples = _rng(seed, split, "examples"), []
    while len(examples) < count:
        pattern = list(PATTERNS)[len(examples) // 2 % len(PATTERNS)]
        deck = Deck(rng, split)
        account = draw_account(deck)
        tx = draw_transaction(deck, account, {pattern})
        opening = _opening(account, render_transaction(tx))
        examples.append(Example(opening, "fraud", pattern, pattern, answer(account, tx, pattern)))
        account, tx = legitimate_twin(account, tx, pattern)
        examples.append(Example(_opening(account, render_transaction(tx)), "legit", "R00", pattern, LEGIT))
    return examples[:count]


def conversations(seed: int, split: str, turns: int, explain: float):
    """Endless training conversations: one account, then `turns` requests about one transaction each.

    The first request is to judge, with an account drawn as `generate` draws it; then comes a `listing` of the account.
    Of the other requests, a fraction `explain` asks for an `explanation` of a transaction that may break many rules. A
    verdict alone teaches little: listing and explaining name the relations it rests on, many for one reading of the
    profile, each standing about evenly often.
    """
    rng = _rng(seed, split, "conversations")
    while True:
        deck = Deck(rng, split)
        account = draw_account(deck)
        pattern = rng.choice(list(PATTERNS))
        tx = draw_transaction(deck, account, {pattern})
        if rng.random() < .5:
            (account, tx), pattern = legitimate_twin(account, tx, pattern), None
        messages = _opening(account, render_transaction(tx))
        messages += [{"role": "assistant", "content": answer(account, tx, pattern)},
                     {"role": "user", "content": LIST},
                     {"role": "assistant", "content": listing(account, rng), "verdict": False}]
        for _ in range(turns - 1):
            explained = rng.random() < explain
            broken = draw_broken_rules(rng, account)
            if not explained:
                broken = set(rng.sample(sorted(broken), 1)) if broken and rng.random() < .55 else set()
            tx = draw_transaction(deck, account, broken)
            said = explanation(account, tx) if explained else answer(account, tx, next(iter(broken), None))
            messages += [{"role": "user", "content": render_transaction(tx, EXPLAIN if explained else JUDGE)},
                         {"role": "assistant", "content": said, "verdict": not explained}]
        yield messages


def profile_conversations(seed: int, split: str, listings: int):
    """Endless easier conversations, to begin a training with: an account without history, listed again and again."""
    rng = _rng(seed, split, "profiles")
    while True:
        account = replace(draw_account(Deck(rng, split)), history=())
        messages = _opening(account, LIST)
        for turn in range(listings):
            messages += [{"role": "user", "content": LIST}] * (turn > 0)
            messages.append({"role": "assistant", "content": listing(account, rng), "verdict": False})
        yield messages


def format_messages(messages: list[dict], add_generation_prompt: bool = True) -> str:
    """ChatML, as the tokenizer's chat template writes it."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def write_jsonl(path: str | Path, examples: list[Example]) -> None:
    """One JSON object per line: ``messages``, ``label``, ``reason``, ``pattern``, ``answer``."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(vars(example)) + "\n")
