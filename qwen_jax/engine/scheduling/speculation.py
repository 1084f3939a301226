"""Speculative decoding: guesses of the next tokens, which one step checks together (https://arxiv.org/abs/2211.17192).

Guesses come from the text itself, where its last tokens stood before (prompt lookup), or from a smaller model. A step
draws every token itself, with the random number of its place in the answer, and keeps its tokens as far as they say the
same as the guesses: the answer is the one without speculation, drawn from the same distribution, in fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence as Sized
from weakref import WeakKeyDictionary

from qwen_jax.engine.scheduling.sequence import Sequence
from qwen_jax.engine.scheduling.step_plan import DRAWN, StepPlan
from qwen_jax.errors import UserError

NGRAM, DRAFT_MODEL = "ngram", "draft_model"
LOOKUPS = (4, 2)      # tokens that have to stand there already, the longer first
SMOOTHING = 0.2       # weight of the latest step in a running mean
ASSUMED_COST = 1.5    # of a step with drafts in plain steps, before there was a plain one
RETRY_TOKENS = 64     # after so many tokens a sequence that did not gain from drafts tries again


class NgramIndex:
    """Where each run of a few tokens stood last in a growing text."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places = {size: {} for size in LOOKUPS}  # run -> index of the token after it

    def extend(self, tokens: Sized[int]) -> None:
        for token in tokens:
            for size, places in self._places.items():  # the run before this token now has something after it
                if len(self._tokens) >= size:
                    places[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def guess(self, most: int) -> list[int]:
        """What followed where the last tokens stood before; a text that repeats itself is taken to go on doing so."""
        for size, places in self._places.items():
            place = places.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if place is not None:
                period = len(self._tokens) - place
                return [self._tokens[place + index % period] for index in range(most)]
        return []


class Gain:
    """What drafts did for one sequence."""

    def __init__(self, optimism: float) -> None:
        self.tokens = optimism  # running mean of tokens per step with drafts
        self.off_until = 0  # tokens of the answer


class Speculation:
    """Decides who guesses, and whether a step with guesses pays.

    Args:
      kind: `NGRAM` or `DRAFT_MODEL`.
      most: guesses per row and step.
    """

    def __init__(self, kind: str, most: int) -> None:
        if kind not in (NGRAM, DRAFT_MODEL):
            raise UserError(f"unknown speculation {kind!r}: use {NGRAM!r}, or give a draft model")
        self.kind, self.most = kind, most
        self.drafted = self.accepted = 0  # tokens
        self._gains: WeakKeyDictionary[Sequence, Gain] = WeakKeyDictionary()
        self._texts: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()
        self._out_of_step: WeakKeyDictionary[Sequence, None] = WeakKeyDictionary()  # draft model: misses tokens
        self._plain_seconds: float | None = None  # per token of a row
        self._checking_seconds: float | None = None  # per step

    def propose(self, seq: Sequence) -> list[int]:
        """Guesses for a sequence that may have some; penalties would make its later tokens depend on earlier ones in
        the same step, and a grammar has to see each token."""
        gain = self._gains.setdefault(seq, Gain(1 + 0.7 * self.most))
        if seq.burst == 1 or (seq.params is not None and seq.params.uses_counts) or len(seq.output) < gain.off_until:
            return []
        if gain.tokens < self._cost():
            gain.off_until, gain.tokens = len(seq.output) + RETRY_TOKENS, self._cost()
            return []
        if self.kind == DRAFT_MODEL:
            return [] if seq in self._out_of_step else [DRAWN] * self.most
        text = self._texts.get(seq)
        if text is None or len(text) > seq.num_tokens:  # it has begun again
            text = self._texts[seq] = NgramIndex()
            text.extend(seq.prompt)
        text.extend(seq.output[len(text) - len(seq.prompt):])
        return text.guess(self.most)

    def record(self, plan: StepPlan, emitted: Sized[int], seconds: float) -> None:
        """A step that ran for this long and gave row i ``emitted[i]`` tokens."""
        if plan.bucket.phase == "prefill":
            for row in plan.rows:
                self._out_of_step.pop(row.seq, None)
        elif plan.bucket.tokens == 1:
            self._plain_seconds = _mean(self._plain_seconds, seconds / max(emitted))
            for row in plan.rows:
                self._out_of_step[row.seq] = None
        else:
            self._checking_seconds = _mean(self._checking_seconds, seconds)
            for row, count in zip(plan.rows, emitted, strict=True):
                if row.drafts:
                    gain = self._gains[row.seq]
                    gain.tokens = _mean(gain.tokens, count)
                    self.drafted += len(row.drafts)
                    self.accepted += count - 1

    def _cost(self) -> float:
        """Of a step with drafts, in tokens that a row would get in the same time without."""
        if self._plain_seconds is None or self._checking_seconds is None:
            return ASSUMED_COST
        return self._checking_seconds / self._plain_seconds


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else (1 - SMOOTHING) * mean + SMOOTHING * value
