"""A payment to screen as a screening service is asked about it: an object of JSON, and its prompt.

The words for what became of a card, a device or a payment are the upstream system's. They go into the prompt as they
are, so a model can be adapted to a system that has other ones.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_jax.evaluation.fraud.accounts import DAYS, Account, Payment, Transaction
from qwen_jax.evaluation.fraud.text import JUDGE, STANDINGS, SYSTEM, format_messages

PAIRS = tuple(STANDINGS)
# Reason code -> the field of the payment that it is about, and where its standing is written.
FIELDS = {"R01": "device", "R02": "city", "R03": "merchant", "R04": "category", "R05": "amount", "R06": "card",
          "R07": "amount", "R08": "user"}


def request_of(account: Account, tx: Transaction, words: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``{"account": ..., "payment": ...}``. words: what the upstream system says in the place of some of ours."""
    say = lambda word: (words or {}).get(word, word)  # noqa: E731

    def pair(kind: str) -> list[dict[str, str]]:
        return [{"name": name, "standing": say(standing)} for name, standing in zip(getattr(account, kind),
                                                                                   STANDINGS[kind])]

    def past(row: Payment) -> dict[str, str]:
        return {**_place(row), "status": say(row.status), "claim": say(row.claim)}

    history = sorted(account.history, key=lambda row: DAYS.index(row.day))
    profile = {"number": account.number, "limit": int(account.limit), "home": account.home,
               **{kind: pair(kind) for kind in PAIRS}, "history": [past(row) for row in history]}
    return {"account": profile, "payment": {**_place(tx), "card": tx.card, "device": tx.device, "user": tx.user,
                                            "category": tx.category}}


def _place(row: Payment) -> dict[str, Any]:
    return {"day": row.day, "city": row.city, "amount": int(row.amount), "merchant": row.merchant}


def messages_of(request: Mapping[str, Any], ask: str = JUDGE) -> list[dict[str, str]]:
    """The conversation up to where the assistant judges, or explains; all of an account's begin alike."""
    account, payment = request["account"], request["payment"]
    lines = [f"Account {account['number']}", f"Limit {account['limit']}", f"City {account['home']} home"]
    lines += [f"{kind.capitalize()} " + ", ".join(f"{one['name']} {one['standing']}" for one in account[kind])
              for kind in PAIRS]
    lines += ["History", *(f"{row['day']} {row['city']} {row['amount']} {row['status']} {row['merchant']} "
                           f"{row['claim']}" for row in account["history"])]
    lines += [ask, f"{payment['day']} {payment['city']} {payment['amount']} {payment['merchant']} card "
              f"{payment['card']} device {payment['device']} user {payment['user']} category {payment['category']}"]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def prompt_of(request: Mapping[str, Any]) -> str:
    return format_messages(messages_of(request))


def evidence_of(request: Mapping[str, Any], code: str) -> str:
    """The field of the payment that a reason code is about, and what the account says of it."""
    account, payment, field = request["account"], request["payment"], FIELDS[code]
    value = payment[field]
    if code == "R05":
        return f"amount {value} limit {account['limit']}"
    if code in ("R03", "R07"):
        kind = "claim" if code == "R03" else "status"
        found = [row[kind] for row in account["history"] if row[field] == value]
    else:
        found = [one["standing"] for one in account["travel" if field == "city" else field] if one["name"] == value]
    return " ".join([field, str(value), *found])
