"""What a request gets back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Times:
    """When what happened to a request, in seconds of ``time.monotonic``; None for what has not.

    Attributes:
      arrived: it was tokenised and checked; a server puts its own arrival here.
      started: its first step began. first_token, last_token: they were there. ended: the request was over.
    """

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors ``[..., D]`` of length 1; a vector of zeros stays one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


@dataclass
class RequestOutput:
    """One finished answer.

    Attributes:
      text: the answer without special tokens and without the stop string; "" when the engine has no tokenizer.
      token_ids: every generated id, the one that ended it included.
      finish_reason: "stop" | "length" | "abort" | "error".
      schedule: "full_attention" | "sparse_attention" | "recompute".
      density: pages that attention read, as a share of those that full attention reads.
      logprobs: per generated token, {id: log-probability} of the token and of the most likely ones asked for.
      prompt_logprobs: the same for the prompt; None for its first token, which nothing precedes.
      error: what went wrong where ``finish_reason`` is "error".
      index: which of the ``n`` answers to its prompt this is.
      embedding: float32 [D], where one was asked for.
    """

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    schedule: str | None = None
    density: float = 1.0
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    error: str | None = None
    index: int = 0
    weight_version: int = 0
    embedding: np.ndarray | None = None
    times: Times = field(default_factory=Times)


@dataclass(frozen=True)
class Score:
    """A continuation's log-probabilities after its prompt.

    Attributes:
      token_logprobs: of each of its tokens, given the prompt and the tokens before.
      greedy: whether greedy decoding would say it.
    """

    token_logprobs: tuple[float, ...]
    greedy: bool

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)

    @classmethod
    def of(cls, output: RequestOutput, start: int) -> Score:
        """From a scored prompt whose continuation begins at position ``start``."""
        scored = list(zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True))
        return cls(tuple(among[token] for token, among in scored),
                   all(among[token] >= max(among.values()) for token, among in scored))


@dataclass(frozen=True)
class Delta:
    """One piece of a streamed answer. ``text`` may be empty while a character or a stop string is undecided."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
