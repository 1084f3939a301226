"""Results of requests, as callers get them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Times:
    """Moments in the life of a request, in seconds of ``time.monotonic``; None until they happen.

    Attributes:
      arrived: the request was tokenised and checked; a server puts its own arrival here.
      started: its first step began.
      first_token: its first token was sampled.
      last_token: its latest token was sampled.
      ended: its output was complete.
    """

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None


@dataclass
class RequestOutput:
    """Finished answer to a request: its text and tokens, or its embedding, with figures about them.

    Attributes:
      prompt_token_ids: token ids of the prompt.
      text: the answer without special tokens and without the stop string; "" when the engine has no tokenizer.
      token_ids: every generated id, including the last one when it ended the answer.
      finish_reason: "stop", "length", "abort" or "error".
      stop: the stop string that ended it; None for anything else.
      schedule: "full_attention", "sparse_attention" or "recompute".
      density: pages that attention read, as a share of the pages that full attention would have read.
      logprobs: {id: log-probability} for each generated token: of the token and of the most likely ids.
      prompt_logprobs: the same for each token of the prompt; None for its first token, which nothing precedes.
      error: reason when ``finish_reason`` is "error". refused: whether the request's own options are the reason.
      index: number of this answer among the ``n`` to its prompt.
      weight_version: version of the weights that computed it.
      embedding: float32 [D], when an embedding was requested.
      times: moments of the request.
    """

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None
    schedule: str | None = None
    density: float = 1.0
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    error: str | None = None
    refused: bool = False
    index: int = 0
    weight_version: int = 0
    embedding: np.ndarray | None = None
    times: Times = field(default_factory=Times)


@dataclass(frozen=True)
class Delta:
    """New part of a streamed answer: what was generated since the part before.

    ``text`` may be empty while it is undecided whether a character or a stop string is complete.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass(frozen=True)
class Score:
    """Log-probabilities of the tokens of a continuation after its prompt.

    Attributes:
      token_logprobs: log-probability of each of its tokens, given the prompt and the tokens before.
      greedy: whether greedy decoding would generate it.
    """

    token_logprobs: tuple[float, ...]
    greedy: bool

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.token_logprobs)

    @classmethod
    def from_output(cls, output: RequestOutput, start: int) -> Score:
        """Make a continuation's score from prompt log-probabilities; it begins at position ``start`` of the prompt."""
        tokens = list(zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True))
        return cls(tuple(by_id[token] for token, by_id in tokens),
                   all(by_id[token] >= max(by_id.values()) for token, by_id in tokens))


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Return vectors ``[..., D]`` scaled to length 1; a vector of zeros stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
