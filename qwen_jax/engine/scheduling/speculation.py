"""Speculative decoding: guesses of the next tokens, which one step checks together (https://arxiv.org/abs/2211.17192).

Guesses come from the text itself, where its last tokens stood before (prompt lookup), or from a smaller model. A step
draws every token itself, with the random number of its place in the answer, and keeps its tokens as far as they agree
with the guesses: the answer is the one without speculation, drawn from the same distribution, in fewer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from qwen_jax.engine.scheduling.sequence import DRAWN, Sequence, StepPlan
from qwen_jax.errors import UserError

NGRAM, DRAFT_MODEL = "ngram", "draft_model"
LOOKUPS = (4, 2)      # lengths of the n-grams that are looked up, the longer first
SMOOTHING = 0.2       # weight of the latest step in a running mean
ASSUMED_COST = 1.5    # of a step with drafts in plain steps, before both kinds have been timed
RETRY_TOKENS = 64     # tokens after which a sequence that did not gain from drafts tries them again


class NgramIndex:
    """Index of a growing text that finds where its last tokens stood before."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places = {size: {} for size in LOOKUPS}  # n-gram -> index of the token after it

    def extend(self, tokens: list[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            for size, places in self._places.items():  # the n-gram before this token now has a token after it
                if len(self._tokens) >= size:
                    places[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def guess(self, count: int) -> list[int]:
        """Return a guess of the next `count` tokens: those after an earlier place of the last tokens; [] without one.

        A text that repeats itself is assumed to go on doing so.
        """
        for size, places in self._places.items():
            place = places.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if place is not None:
                period = len(self._tokens) - place
                return [self._tokens[place + index % period] for index in range(count)]
        return []


@dataclass
class _Gain:
    """Record of what drafts (guesses of the next tokens) have gained one sequence.

    Attributes:
      tokens: running mean of tokens per step with drafts.
      off_until: length of the answer from which drafts are tried again.
    """

    tokens: float
    off_until: int = 0


class Speculation:
    """Guesses the next tokens of sequences, as long as steps that check guesses yield tokens faster than plain steps.

    Args:
      kind: `NGRAM` or `DRAFT_MODEL`.
      draft_tokens: guesses per row and step.

    Attributes:
      drafted: number of guesses that were checked.
      accepted: number of guesses that were right.
    """

    def __init__(self, kind: str, draft_tokens: int) -> None:
        if kind not in (NGRAM, DRAFT_MODEL):
            raise UserError(f"unknown speculation {kind!r}: use {NGRAM!r}, or give a draft model")
        self.kind, self.draft_tokens = kind, draft_tokens
        self.drafted = self.accepted = 0
        self._gains: WeakKeyDictionary[Sequence, _Gain] = WeakKeyDictionary()
        self._texts: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()
        self._behind: WeakKeyDictionary[Sequence, None] = WeakKeyDictionary()  # the draft model has not seen all tokens
        self._plain_seconds: float | None = None  # per token of a row
        self._checking_seconds: float | None = None  # per step

    def propose(self, seq: Sequence) -> list[int]:
        """Return guesses of the next tokens of a sequence, or none where they do not pay or cannot be checked.

        With penalties later tokens would depend on earlier ones of the same step, and a grammar has to see each token.
        """
        gain = self._gains.setdefault(seq, _Gain(1 + 0.7 * self.draft_tokens))
        if seq.burst == 1 or (seq.params is not None and seq.params.uses_counts) or len(seq.output) < gain.off_until:
            return []
        if gain.tokens < self._cost():
            gain.off_until, gain.tokens = len(seq.output) + RETRY_TOKENS, self._cost()
            return []
        if self.kind == DRAFT_MODEL:
            return [] if seq in self._behind else [DRAWN] * self.draft_tokens
        text = self._texts.get(seq)
        if text is None or len(text) > seq.num_tokens:  # a restarted sequence has lost its answer
            text = self._texts[seq] = NgramIndex()
            text.extend(seq.prompt)
        text.extend(seq.output[len(text) - len(seq.prompt):])
        return text.guess(self.draft_tokens)

    def record(self, plan: StepPlan, emitted: list[int], seconds: float) -> None:
        """Update the measured times and gains by a step that took `seconds` and gave row i ``emitted[i]`` tokens."""
        if plan.bucket.phase == "prefill":
            for row in plan.rows:
                self._behind.pop(row.seq, None)
        elif plan.bucket.tokens == 1:
            self._plain_seconds = _mean(self._plain_seconds, seconds / max(emitted))
            for row in plan.rows:
                self._behind[row.seq] = None
        else:
            self._checking_seconds = _mean(self._checking_seconds, seconds)
            for row, count in zip(plan.rows, emitted, strict=True):
                if row.drafts:
                    gain = self._gains[row.seq]
                    gain.tokens = _mean(gain.tokens, count)
                    self.drafted += len(row.drafts)
                    self.accepted += count - 1

    def _cost(self) -> float:
        """Return how many tokens a row would get from plain steps in the time that one step with drafts takes."""
        if self._plain_seconds is None or self._checking_seconds is None:
            return ASSUMED_COST
        return self._checking_seconds / self._plain_seconds


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else (1 - SMOOTHING) * mean + SMOOTHING * value
