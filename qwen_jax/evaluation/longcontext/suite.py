"""The long-context suite: prompts of a given length for any tokenizer, and exact scores of the answers."""
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.evaluation.longcontext.samples import FAMILIES, draw
from qwen_jax.evaluation.longcontext.tasks import Document, Question

RETRIEVAL = ("single_needle", "many_keys", "many_values", "many_queries", "variable_tracking", "account_history")
AGGREGATION = ("common_words", "frequent_words")  # local attention suffices for these: reported apart

# (prompts as token ids, most tokens to answer with) -> answers as text, greedily decoded
Generate = Callable[[list[list[int]], list[int]], list[str]]


@dataclass(frozen=True)
class Sample:
    prompt: list[int]          # token ids, the beginning of the answer included
    max_tokens: int            # room for the answer; prompt and answer together fit the length
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """Answers to one family at one length."""
    family: str
    length: int    # tokens of prompt and answer together, at most
    samples: int
    right: int     # answers with every expected word in them
    recall: float  # mean fraction of the expected words found: RULER's score

    @property
    def accuracy(self) -> float:
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(self.right, self.samples)


def wilson(right: int, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default."""
    p, n = right / samples, samples
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def found(answer: str, expected: Sequence[str]) -> float:
    """The fraction of the expected words that occur in an answer as whole words, whatever their case."""
    return sum(bool(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE)) for word in expected) / len(expected)


def sample(family: str, seed: str, length: int, tokenizer: Any) -> Sample:
    """`samples_of` with one question."""
    return samples_of(family, seed, length, tokenizer, 1)[0]


def samples_of(family: str, seed: str, length: int, tokenizer: Any, questions: int) -> list[Sample]:
    """At most `questions` prompts about one document, through the tokenizer's chat template if it has one: they begin
    alike. UserError for a short length.

    The same arguments give the same prompts.
    """
    def build(document: Document, question: Question) -> Sample:
        text = f"{document.text}\n{question.text}"
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                 tokenize=False)
        else:
            text += "\n"
        # The prefix is encoded apart: it follows a line end, where Qwen2's pre-tokenizer always splits.
        prompt = [*tokenizer.encode(text, add_special_tokens=False),
                  *tokenizer.encode(question.prefix, add_special_tokens=False)]
        room = 16 + 2 * len(tokenizer.encode(question.answer, add_special_tokens=False))
        return Sample(prompt, room, question.expected)

    def count(document: Document) -> int:
        longest = max(document.questions, key=lambda question: len(question.text + question.prefix + question.answer))
        one = build(document, longest)
        return len(one.prompt) + one.max_tokens

    document = draw(family, seed, length, count, questions)
    return [build(document, question) for question in document.questions]


def check(lengths: Sequence[int], families: Sequence[str], samples: int) -> None:
    """UserError for what `evaluate` cannot run."""
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise UserError(f"unknown family {', '.join(unknown)}: use {', '.join(FAMILIES)}")
    if samples < 1 or not lengths or min(lengths) < 1:
        raise UserError("give at least one sample and one length, of at least one token")


def evaluate(generate: Generate, tokenizer: Any, lengths: Sequence[int], families: Sequence[str] = tuple(FAMILIES),
             samples: int = 50, seed: int = 0) -> Iterator[Cell]:
    """Scores of every family at every length, one after another. UserError for what `check` refuses, and for a length
    that is too short for a family."""
    check(lengths, families, samples)
    for length in lengths:
        for family in families:
            asked = [sample(family, f"{seed}.{index}", length, tokenizer) for index in range(samples)]
            answers = generate([one.prompt for one in asked], [one.max_tokens for one in asked])
            scores = [found(answer, one.expected) for answer, one in zip(answers, asked, strict=True)]
            yield Cell(family, length, samples, sum(score == 1 for score in scores), sum(scores) / samples)
