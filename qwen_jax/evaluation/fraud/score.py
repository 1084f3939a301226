"""Scores of a model's answers to fraud-screening examples."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import PATTERNS
from qwen_jax.evaluation.fraud.task import Example
from qwen_jax.evaluation.fraud.text import format_messages

WIDTH_MULTIPLE = 64  # tokens


@dataclass(frozen=True)
class PatternScore:
    """Fractions of the examples of one pattern (a rule to break) that were answered with the right label."""
    examples: int
    fraud: float   # fraction of the frauds that were called fraud
    twin: float    # fraction of their legitimate twins that were called legit
    reason: float  # fraction of the frauds that were called fraud for the right reason


@dataclass(frozen=True)
class Score:
    """Fractions of all examples answered right, and the same for each pattern (a rule to break)."""
    accuracy: float  # fraction with the right label; an answer that is neither label is wrong
    majority: float  # accuracy of always giving the commoner label
    reason: float    # fraction with the right label and reason code
    patterns: dict[str, PatternScore]

    def table(self) -> str:
        """Return the scores as a text table with a line per pattern."""
        lines = [f"{'pattern':59} {'n':>5} {'fraud':>6} {'twin':>6} {'reason':>6}"]
        lines += [f"{name} {PATTERNS[name]:55} {p.examples:5} {p.fraud:6.3f} {p.twin:6.3f} {p.reason:6.3f}"
                  for name, p in self.patterns.items()]
        return "\n".join([*lines, f"accuracy {self.accuracy:.4f}, label and reason {self.reason:.4f}, "
                                  f"majority class {self.majority:.4f}"])


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def score(texts: Sequence[str], examples: Sequence[Example]) -> Score:
    """Compare answers such as ``fraud R03 merchant Kalomart disputed`` with the right ones, and return their score.

    Only label and reason code count.
    """
    if len(texts) != len(examples) or not texts:
        raise UserError(f"there must be an answer for every example, and at least one, not {len(texts)} answers for "
                        f"{len(examples)} examples")
    words = [(text.split() + ["", ""])[:2] for text in texts]
    label = [word == e.label for (word, _), e in zip(words, examples)]
    reason = [right and code == e.reason for right, (_, code), e in zip(label, words, examples)]
    frauds = [e.label == "fraud" for e in examples]
    patterns = {}
    for name in PATTERNS:
        mine = [i for i, e in enumerate(examples) if e.pattern == name]
        if mine:
            fraud, twin = [i for i in mine if frauds[i]], [i for i in mine if not frauds[i]]
            patterns[name] = PatternScore(len(mine), _mean([label[i] for i in fraud]), _mean([label[i] for i in twin]),
                                          _mean([reason[i] for i in fraud]))
    return Score(_mean(label), max(_mean(frauds), 1 - _mean(frauds)), _mean(reason), patterns)


def answers_in_one_pass(logits_of: Callable[[np.ndarray], np.ndarray], tokenizer: Tokenizer,
                        examples: Sequence[Example], rows: int = 16) -> list[str]:
    """Return a model's answers to examples from one forward pass per `rows` of them, instead of generation.

    logits_of: int32 tokens [rows, T] -> logits [rows, T, V]; T is the same multiple of `WIDTH_MULTIPLE` in all calls,
    so it compiles once. The right answer is appended to each prompt, and the most likely token is read at each of its
    positions. The first token, the label, is exactly that of greedy decoding; later tokens are, as long as the tokens
    before them are right.
    """
    prompts = [tokenizer.encode(format_messages(e.messages)).ids for e in examples]
    answers = [tokenizer.encode(e.answer + "<|im_end|>").ids for e in examples]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers))
    width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    texts = []
    for start in range(0, len(examples), rows):
        tokens = np.zeros((rows, width), np.int32)
        chunk = list(zip(prompts, answers))[start:start + rows]
        for row, (prompt, answer) in enumerate(chunk):
            tokens[row, :len(prompt) + len(answer)] = prompt + answer
        best = np.asarray(logits_of(tokens)).argmax(-1)
        texts += [tokenizer.decode(best[row, len(prompt) - 1:len(prompt) + len(answer) - 1].tolist())
                  for row, (prompt, answer) in enumerate(chunk)]
    return texts
