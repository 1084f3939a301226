"""Request to a screening service about a payment: a JSON object, and the prompt that is made of it.

The words for the standing of a card, a device or a payment are the upstream system's. They go into the prompt
unchanged, so a model can be adapted to a system that uses other words.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_jax.evaluation.fraud.accounts import DAYS, Account, Payment, Transaction
from qwen_jax.evaluation.fraud.text import JUDGE, STANDINGS, SYSTEM, format_messages

PAIRS = tuple(STANDINGS)
# Reason code -> the field of the payment whose standing decides.
FIELDS = {"R01": "device", "R02": "city", "R03": "merchant", "R04": "category", "R05": "amount", "R06": "card",
          "R07": "amount", "R08": "user"}


def request_of(account: Account, tx: Transaction, words: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the JSON request to screen the transaction `tx`: ``{"account": ..., "payment": ...}``.

    words: words of ours -> the upstream system's words.
    """
    upstream = lambda word: (words or {}).get(word, word)  # noqa: E731

    def pair(kind: str) -> list[dict[str, str]]:
        return [{"name": name, "standing": upstream(standing)}
                for name, standing in zip(getattr(account, kind), STANDINGS[kind])]

    def past(row: Payment) -> dict[str, str]:
        return {**_basics(row), "status": upstream(row.status), "claim": upstream(row.claim)}

    history = sorted(account.history, key=lambda row: DAYS.index(row.day))
    profile = {"number": account.number, "limit": int(account.limit), "home": account.home,
               **{kind: pair(kind) for kind in PAIRS}, "history": [past(row) for row in history]}
    return {"account": profile, "payment": {**_basics(tx), "card": tx.card, "device": tx.device, "user": tx.user,
                                            "category": tx.category}}


def _basics(row: Payment) -> dict[str, Any]:
    """Return the JSON fields that past payments and the payment to judge have in common."""
    return {"day": row.day, "city": row.city, "amount": int(row.amount), "merchant": row.merchant}


def messages_of(request: Mapping[str, Any], ask: str = JUDGE) -> list[dict[str, str]]:
    """Return the chat messages (system and user) that put a screening request to the model.

    Those about one account begin alike, for the prefix cache.
    """
    account, payment = request["account"], request["payment"]
    lines = [f"Account {account['number']}", f"Limit {account['limit']}", f"City {account['home']} home"]
    lines += [f"{kind.capitalize()} " + ", ".join(f"{member['name']} {member['standing']}" for member in account[kind])
              for kind in PAIRS]
    lines += ["History", *(f"{row['day']} {row['city']} {row['amount']} {row['status']} {row['merchant']} "
                           f"{row['claim']}" for row in account["history"])]
    lines += [ask, f"{payment['day']} {payment['city']} {payment['amount']} {payment['merchant']} card "
              f"{payment['card']} device {payment['device']} user {payment['user']} category {payment['category']}"]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def prompt_of(request: Mapping[str, Any]) -> str:
    """Return the ChatML prompt that asks for a verdict on a request."""
    return format_messages(messages_of(request))


def evidence_of(request: Mapping[str, Any], code: str) -> str:
    """Return the evidence for a reason code: the payment's field and value, and the account's words about it."""
    account, payment, field = request["account"], request["payment"], FIELDS[code]
    value = payment[field]
    if code == "R05":
        return f"amount {value} limit {account['limit']}"
    if code in ("R03", "R07"):
        kind = "claim" if code == "R03" else "status"
        standing = [row[kind] for row in account["history"] if row[field] == value]
    else:
        pair = account["travel" if field == "city" else field]
        standing = [member["standing"] for member in pair if member["name"] == value]
    return " ".join([field, str(value), *standing])
