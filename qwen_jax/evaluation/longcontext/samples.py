"""Documents of the long-context tasks, drawn to a wanted length in tokens of any tokenizer."""
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
    """Draw a document of a task family with at most `tokens` tokens, seldom more than two lines shorter.

    count: returns a document's number of tokens, plus room for anything else that must fit. The same arguments give the
    same document. Raises UserError when not even a few lines fit.
    """
    def build(lines: int) -> tuple[int, Document]:
        document = FAMILIES[family](random.Random(f"{family} {seed}"), lines, questions)
        return count(document), document

    few, lines = 4, 36
    (fewest, _), (size, document) = build(few), build(lines)
    for _ in range(6):  # lines differ in length: each guess from their mean length comes closer
        per_line = max(1.0, (size - fewest) / (lines - few))
        missing = int((tokens - size) / per_line)
        if not missing:
            break
        lines = max(few + 1, lines + missing)
        size, document = build(lines)
    while size > tokens and lines > few:
        lines -= 1
        size, document = build(lines)
    if size > tokens:
        raise UserError(f"{family} does not fit into {tokens} tokens: the shortest document has {size}")
    return document
