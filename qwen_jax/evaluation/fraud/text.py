"""Texts of accounts, transactions and answers about them, for the fraud-screening task."""
import random

from qwen_jax.evaluation.fraud.accounts import DAYS, Account, Payment, Transaction

SYSTEM = "Screen card payments. Answer fraud or legit, a reason code and the evidence."
LEGIT = "legit R00"
JUDGE, EXPLAIN = "Judge", "Explain"
STANDINGS = {  # kind of pair in a profile -> the words for its two members
    "card": ("active", "lost"), "device": ("trusted", "removed"), "user": ("added", "deleted"),
    "category": ("allowed", "blocked"), "travel": ("notice", "ended")}


def _pair(rng: random.Random, account: Account, kind: str) -> str:
    members = list(zip(STANDINGS[kind], getattr(account, kind)))
    return f"{kind.capitalize()} " + ", ".join(f"{name} {standing}" for standing, name in rng.sample(members, 2))


def _payment(row: Payment) -> str:
    status, claim = (f" {mark}" if mark else "" for mark in (row.status, row.claim))
    return f"{row.day} {row.city} {row.amount}{status} {row.merchant}{claim}"


def render_account(account: Account) -> str:
    """Return an account's profile and payment history as text, in the account's own order of lines and pairs."""
    rng = random.Random(account.layout)
    lines = [f"Limit {account.limit}", f"City {account.home} home", *(_pair(rng, account, kind) for kind in STANDINGS)]
    rng.shuffle(lines)
    history = sorted(account.history, key=lambda row: DAYS.index(row.day))
    return "\n".join([f"Account {account.number}", *lines, "History", *map(_payment, history)])


def render_transaction(tx: Transaction, request: str = JUDGE) -> str:
    """Return the text that asks to judge or to explain a transaction."""
    return f"{request}\n{_payment(tx)} card {tx.card} device {tx.device} user {tx.user} category {tx.category}"


def evidence(account: Account, tx: Transaction, pattern: str) -> str:
    """Return the transaction's field that breaks the rule `pattern`, and the account's fact that it contradicts."""
    return {"R01": f"device {tx.device} removed", "R02": f"city {tx.city} ended",
            "R03": f"merchant {tx.merchant} disputed", "R04": f"category {tx.category} blocked",
            "R05": f"amount {tx.amount} limit {account.limit}", "R06": f"card {tx.card} lost",
            "R07": f"amount {tx.amount} declined", "R08": f"user {tx.user} deleted"}[pattern]


def answer(account: Account, tx: Transaction, pattern: str | None) -> str:
    """Return the right verdict on a transaction that breaks the rule `pattern`, or no rule (None)."""
    return LEGIT if pattern is None else f"fraud {pattern} {evidence(account, tx, pattern)}"


def explanation(account: Account, tx: Transaction) -> str:
    """Return the right answer to ``Explain``: each field of the transaction followed by its standing.

    A standing is what the account says of it, such as ``trusted`` or ``blocked``.
    """
    words = [f"limit {'over' if int(tx.amount) > int(account.limit) else 'under'}"]
    words += [f"{getattr(tx, kind)} {names[getattr(account, kind).index(getattr(tx, kind))]}"
              for kind, names in STANDINGS.items() if kind != "travel"]
    cities = {account.home: "home", **dict(zip(account.travel, STANDINGS["travel"]))}
    amounts = {row.amount: row.status for row in account.history}
    claims = {row.merchant: row.claim for row in account.history}
    words += [f"{tx.city} {cities[tx.city]}", f"{tx.amount} {amounts.get(tx.amount, 'new')}",
              f"{tx.merchant} {claims.get(tx.merchant, 'new')}"]
    return " ".join(words)


def format_messages(messages: list[dict], add_generation_prompt: bool = True) -> str:
    """Return chat messages as one ChatML text, as the tokenizer's chat template writes them."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" * add_generation_prompt
