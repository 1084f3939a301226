"""Card-transaction screening: a generated task with known answers.

A conversation holds an account profile, a few recent payments and one transaction to judge. The assistant answers
``fraud Rnn evidence`` or ``legit R00``. Eight rules can be broken, and a fraudulent transaction breaks exactly one.

Every fraudulent example has a legitimate **twin** made of the same words: two identifiers have exchanged their places
in the profile or the history (the trusted device and the removed one, the limit and the amount), so that the same
transaction is in order. The set of words says nothing; their places decide. Each rule joins a fact in the profile or
the history with a fact in the transaction, usually more than a hundred tokens apart.

    python: generate(seed=0, split="heldout", count=4)  ->  [fraud, its twin, fraud, its twin]
"""
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import (
    PATTERNS,
    Account,
    draw_account,
    draw_broken_rules,
    draw_transaction,
    legitimate_twin,
)
from qwen_jax.evaluation.fraud.names import SPLITS, Deck
from qwen_jax.evaluation.fraud.text import (
    EXPLAIN,
    JUDGE,
    LEGIT,
    SYSTEM,
    answer,
    explanation,
    render_account,
    render_transaction,
)


@dataclass(frozen=True)
class Example:
    """Transaction to judge, as messages, with the right answer.

    `pattern` is the rule in question: broken in a fraud, kept in its legitimate twin.
    """
    messages: list[dict]  # system, user
    label: str            # "fraud" | "legit"
    reason: str           # "R00" when legitimate
    pattern: str          # "R01" … "R08"
    answer: str           # the right answer of the assistant


def _rng(seed: int, split: str, purpose: str) -> random.Random:
    """Return a random generator for this seed, split and purpose. UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    return random.Random(f"{purpose} {seed} {split}")


def _opening(account: Account, *request: str) -> list[dict]:
    """Return the messages of a conversation: the system's, and the user's with account profile and request."""
    return [{"role": "system", "content": SYSTEM},
            {"role": "user", "content": "\n".join([render_account(account), *request])}]


def generate(seed: int, split: str, count: int) -> list[Example]:
    """Generate `count` examples, by turns a fraud and its legitimate twin: examples 2i and 2i + 1.

    Patterns (rules to break) take turns.

    The same arguments give the same examples on every machine. Splits share no account number, name, code or amount.
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


class Turn(NamedTuple):
    """Request about an account, to judge or to explain a transaction, and the right answer to it."""
    request: str
    answer: str
    verdict: bool  # whether the answer is a judgement


def conversations(seed: int, split: str, turns: int, explain: float) -> Iterator[tuple[list[dict], list[Turn]]]:
    """Yield endless training material: an account, and `turns` requests about it, each a conversation of its own.

    Yields (opening, turns): the user's message is the opening's last message, a line end and one turn's request.

    The first request asks for a verdict, about an account drawn as in `generate`. A fraction `explain` of the other
    requests asks for an `explanation` of a transaction that may break many rules. A verdict alone teaches little: an
    explanation names the facts that a verdict rests on, each of them about equally often.
    """
    rng = _rng(seed, split, "conversations")
    while True:
        deck = Deck(rng, split)
        account = draw_account(deck)
        pattern = rng.choice(list(PATTERNS))
        tx = draw_transaction(deck, account, {pattern})
        if rng.random() < .5:
            (account, tx), pattern = legitimate_twin(account, tx, pattern), None
        requests = [Turn(render_transaction(tx), answer(account, tx, pattern), True)]
        while len(requests) < turns:
            explained = rng.random() < explain
            broken = draw_broken_rules(rng, account)
            if not explained:
                broken = set(rng.sample(sorted(broken), 1)) if broken and rng.random() < .55 else set()
            tx = draw_transaction(deck, account, broken)
            right = explanation(account, tx) if explained else answer(account, tx, next(iter(broken), None))
            requests.append(Turn(render_transaction(tx, EXPLAIN if explained else JUDGE), right, not explained))
        yield _opening(account), requests


def write_jsonl(path: str | Path, examples: list[Example]) -> None:
    """Write examples to a file of JSON lines: ``messages``, ``label``, ``reason``, ``pattern``, ``answer``."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(vars(example)) + "\n")
