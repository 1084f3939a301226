"""Documents of a wanted length in tokens, whatever the tokenizer counts."""
import random
from collections.abc import Callable

from qwen_jax.errors import UserError
from qwen_jax.evaluation.longcontext.account import account_history
from qwen_jax.evaluation.longcontext.tasks import (
    Document,
    Family,
    common_words,
    frequent_words,
    many_keys,
    many_queries,
    many_values,
    single_needle,
    variable_tracking,
)

FAMILIES: dict[str, Family] = {
    "single_needle": single_needle, "many_keys": many_keys, "many_values": many_values, "many_queries": many_queries,
    "variable_tracking": variable_tracking, "common_words": common_words, "frequent_words": frequent_words,
    "account_history": account_history}


def draw(family: str, seed: int | str, tokens: int, count: Callable[[Document], int], questions: int = 1) -> Document:
    """A document of at most `tokens` tokens, seldom more than two lines shorter.

    count: how many tokens it takes, with whatever else is to fit. The same arguments give the same document. UserError
    when not even a few lines fit.
    """
    def build(lines: int) -> tuple[int, Document]:
        document = FAMILIES[family](random.Random(f"{family} {seed}"), lines, questions)
        return count(document), document

    few, lines = 4, 36
    shortest, found = build(few), build(lines)
    for _ in range(6):  # lines are not equally long, so guesses from their mean length close in
        per_line = max(1.0, (found[0] - shortest[0]) / (lines - few))
        missing = int((tokens - found[0]) / per_line)
        if not missing:
            break
        lines = max(few + 1, lines + missing)
        found = build(lines)
    while found[0] > tokens and lines > few:
        lines -= 1
        found = build(lines)
    if found[0] > tokens:
        raise UserError(f"{family} does not fit into {tokens} tokens: the shortest document has {found[0]}")
    return found[1]
