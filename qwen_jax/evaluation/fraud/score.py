"""Scores of fraud-screening answers."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import PATTERNS
from qwen_jax.evaluation.fraud.task import Example
from qwen_jax.evaluation.fraud.text import format_messages


@dataclass(frozen=True)
class PatternScore:
    """Fractions of one pattern's examples answered with the right label."""
    examples: int
    fraud: float   # of its frauds, those called fraud
    twin: float    # of their legitimate twins, those called legit
    reason: float  # of its frauds, those called fraud for the right reason


@dataclass(frozen=True)
class Score:
    accuracy: float  # fraction with the right label; an answer that is neither label is wrong
    majority: float  # accuracy of always giving the commoner label
    reason: float    # fraction with the right label and reason code
    patterns: dict[str, PatternScore]

    def table(self) -> str:
        lines = [f"{'pattern':59} {'n':>5} {'fraud':>6} {'twin':>6} {'reason':>6}"]
        lines += [f"{name} {PATTERNS[name]:55} {p.examples:5} {p.fraud:6.3f} {p.twin:6.3f} {p.reason:6.3f}"
                  for name, p in self.patterns.items()]
        return "\n".join([*lines, f"accuracy {self.accuracy:.4f}, label and reason {self.reason:.4f}, "
                                  f"majority class {self.majority:.4f}"])


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def score(texts: Sequence[str], examples: Sequence[Example]) -> Score:
    """Scores answers such as ``fraud R03 merchant Kalomart disputed``; only label and reason code count."""
    if len(texts) != len(examples) or not texts:
        raise UserError(f"{len(texts)} answers for {len(examples)} examples: give one each, at least one")
    words = [(text.split() + ["", ""])[:2] for text in texts]
    label = [said == e.label for (said, _), e in zip(words, examples)]
    reason = [ok and why == e.reason for ok, (_, why), e in zip(label, words, examples)]
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
                        examples: Sequence[Example], rows: int = 16, multiple: int = 64) -> list[str]:
    """What a model would answer, from one forward pass per `rows` examples instead of generation.

    logits_of: int32 tokens [rows, T] -> logits [rows, T, V]; T is one multiple of `multiple`, so it compiles once. The
    right answer is appended to each prompt and the most likely token is read at each of its positions: the first
    token, the label, is exactly what greedy decoding gives; later ones are, as long as those before them are right.
    """
    prompts = [tokenizer.encode(format_messages(e.messages)).ids for e in examples]
    answers = [tokenizer.encode(e.answer + "<|im_end|>").ids for e in examples]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers))
    width = -(-width // multiple) * multiple
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
