"""The long-context suite: prompts of a given length for any tokenizer, and exact scores of the answers."""
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from tqdm import tqdm

from qwen_jax.errors import UserError, check_positive_integer
from qwen_jax.evaluation.longcontext.samples import FAMILIES, draw
from qwen_jax.evaluation.longcontext.tasks import Document, Question

RETRIEVAL = ("single_needle", "many_keys", "many_values", "many_queries", "variable_tracking", "account_history")
AGGREGATION = ("common_words", "frequent_words")  # reported apart, because local attention suffices for them

# (prompts as token ids, most tokens of each answer) -> answers as text, greedily decoded
Generate = Callable[[list[list[int]], list[int]], list[str]]


@dataclass(frozen=True)
class Sample:
    """Prompt of the long-context suite, and the words expected in its answer."""
    prompt: list[int]          # token ids, the beginning of the answer included
    max_tokens: int            # most tokens of the answer; prompt and answer together fit the length
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """Result of a model on one task family at one length of prompt and answer."""
    family: str
    length: int    # most tokens of prompt and answer together
    samples: int   # number of answers
    right: int     # number of answers that contain every expected word
    recall: float  # mean fraction of the expected words in an answer: RULER's score

    @property
    def accuracy(self) -> float:
        """Fraction of the answers that contain every expected word."""
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, as its lower and upper end."""
        return wilson(self.right, self.samples)


def wilson(right: int, samples: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of the proportion `right` of `samples` (Wilson 1927)."""
    p, n, z = right / samples, samples, 1.959964
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def found(answer: str, expected: Sequence[str]) -> float:
    """Return the fraction of the expected words that occur in an answer as whole words, in upper or lower case."""
    return sum(bool(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE)) for word in expected) / len(expected)


def sample(family: str, seed: str, length: int, tokenizer: Any) -> Sample:
    """Draw one prompt of a task family, with a document of its own. The same arguments give the same prompt."""
    return samples_of(family, seed, length, tokenizer, 1)[0]


def samples_of(family: str, seed: str, length: int, tokenizer: Any, questions: int) -> list[Sample]:
    """Draw at most `questions` prompts of a task family about one document, in the tokenizer's chat template if any.

    The prompts begin alike. The same arguments give the same prompts. Raises UserError when the length is too short.
    """
    def build(document: Document, question: Question) -> Sample:
        text = f"{document.text}\n{question.text}"
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                 tokenize=False)
        else:
            text += "\n"
        # The prefix can be encoded apart: it follows a line end, where Qwen2's pre-tokenizer always splits.
        prompt = [*tokenizer.encode(text, add_special_tokens=False),
                  *tokenizer.encode(question.prefix, add_special_tokens=False)]
        room = 16 + 2 * len(tokenizer.encode(question.answer, add_special_tokens=False))
        return Sample(prompt, room, question.expected)

    def count(document: Document) -> int:
        longest = max(document.questions, key=lambda question: len(question.text + question.prefix + question.answer))
        sample = build(document, longest)
        return len(sample.prompt) + sample.max_tokens

    document = draw(family, seed, length, count, questions)
    return [build(document, question) for question in document.questions]


def check(lengths: Sequence[int], families: Sequence[str], samples: int) -> None:
    """Raise UserError for lengths, task families or numbers of samples that `evaluate` cannot run."""
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise UserError(f"unknown family {', '.join(unknown)}: use {', '.join(FAMILIES)}")
    check_positive_integer("samples", samples)
    if not lengths:
        raise UserError("lengths must not be empty: name at least one number of tokens")
    for length in lengths:
        check_positive_integer("a length", length)


def evaluate(generate: Generate, tokenizer: Any, lengths: Sequence[int], families: Sequence[str] = tuple(FAMILIES),
             samples: int = 50, seed: int = 0, batch_size: int = 8) -> Iterator[Cell]:
    """Measure a model's accuracy on every task family at every length, and yield the results one by one.

    Progress within a family is shown on a terminal.

    generate: the model's answers to at most ``batch_size`` prompts.

    Raises UserError for arguments that `check` refuses, and for a length that is too short for a family.
    """
    check(lengths, families, samples)
    for length in lengths:
        for family in families:
            drawn = [sample(family, f"{seed}.{index}", length, tokenizer) for index in range(samples)]
            scores = []
            about = f"{family}, {length} tokens"
            with tqdm(total=samples, desc=about, unit="answer", disable=None, leave=False) as bar:
                for start in range(0, samples, batch_size):
                    part = drawn[start: start + batch_size]
                    answers = generate([s.prompt for s in part], [s.max_tokens for s in part])
                    scores += [found(answer, s.expected) for answer, s in zip(answers, part, strict=True)]
                    bar.update(len(part))
            yield Cell(family, length, samples, sum(score == 1 for score in scores), sum(scores) / samples)
