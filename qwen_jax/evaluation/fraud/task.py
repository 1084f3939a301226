"""Card-transaction screening: a generated task with a known answer.

A conversation holds an account profile, a few recent payments and one transaction to judge. The assistant answers
``fraud Rnn evidence`` or ``legit R00``. Eight rules can be broken, and a fraudulent transaction breaks exactly one.

Every fraudulent example has a legitimate **twin** made of the same words: two identifiers have exchanged their places
in the profile or the history (the trusted device and the removed one, the limit and the amount), so that the same
transaction is in order. Which words occur, and how often, says nothing; which word stands where decides. Each rule
joins a fact in the profile or the history with one in the transaction, usually more than a hundred tokens apart.

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
    """One transaction to judge. `pattern` is the rule in question: broken in a fraud, kept in its legitimate twin."""
    messages: list[dict]  # system, user
    label: str            # "fraud" | "legit"
    reason: str           # "R00" when legitimate
    pattern: str          # "R01" … "R08"
    answer: str           # what the assistant should say


def _rng(seed: int, split: str, purpose: str) -> random.Random:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    return random.Random(f"{purpose} {seed} {split}")


def _opening(account: Account, *request: str) -> list[dict]:
    return [{"role": "system", "content": SYSTEM},
            {"role": "user", "content": "\n".join([render_account(account), *request])}]


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


class Turn(NamedTuple):
    """One request about an account and the right answer to it."""
    request: str
    answer: str
    verdict: bool  # whether the answer is a judgement


def conversations(seed: int, split: str, turns: int, explain: float) -> Iterator[tuple[list[dict], list[Turn]]]:
    """Endless training material: an account, and `turns` requests about it, each a conversation of its own.

    Gives (opening, turns): what the user says is the opening's last message, a line end and one turn's request.

    The first request is to judge, with an account drawn as `generate` draws it. Of the others, a fraction `explain`
    asks for an `explanation` of a transaction that may break many rules. A verdict alone teaches little: an explanation
    names the relations it rests on, each standing about evenly often.
    """
    rng = _rng(seed, split, "conversations")
    while True:
        deck = Deck(rng, split)
        account = draw_account(deck)
        pattern = rng.choice(list(PATTERNS))
        tx = draw_transaction(deck, account, {pattern})
        if rng.random() < .5:
            (account, tx), pattern = legitimate_twin(account, tx, pattern), None
        asked = [Turn(render_transaction(tx), answer(account, tx, pattern), True)]
        while len(asked) < turns:
            explained = rng.random() < explain
            broken = draw_broken_rules(rng, account)
            if not explained:
                broken = set(rng.sample(sorted(broken), 1)) if broken and rng.random() < .55 else set()
            tx = draw_transaction(deck, account, broken)
            said = explanation(account, tx) if explained else answer(account, tx, next(iter(broken), None))
            asked.append(Turn(render_transaction(tx, EXPLAIN if explained else JUDGE), said, not explained))
        yield _opening(account), asked


def write_jsonl(path: str | Path, examples: list[Example]) -> None:
    """One JSON object per line: ``messages``, ``label``, ``reason``, ``pattern``, ``answer``."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(vars(example)) + "\n")
