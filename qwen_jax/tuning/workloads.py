"""Request traces by which tuning choices are judged: the lengths of requests that are all submitted at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_jax.engine.api.sampling_params import SamplingParams


@dataclass(frozen=True)
class Load:
    """A kind of workload: number of requests, and ranges of the lengths of their prompts and answers in tokens.

    Attributes:
      requests: number of requests.
      prompt: smallest and largest length of a prompt, drawn log-uniformly.
      answer: smallest and largest length of an answer, drawn uniformly.
    """

    requests: int
    prompt: tuple[int, int]
    answer: tuple[int, int]


LOADS = {
    "chat": Load(12, (16, 128), (32, 64)),  # some short conversations
    "documents": Load(6, (512, 1536), (8, 32)),  # long prompts, short answers
    "crowd": Load(64, (8, 64), (32, 64)),  # many rows in decode
    "classify": Load(48, (32, 512), (1, 1)),  # prefill only
    "mixed": Load(32, (16, 1024), (1, 128)),
}


@dataclass(frozen=True)
class Trace:
    """Lengths in tokens of the prompts and answers of a load's requests, drawn by a seed."""

    name: str
    prompts: tuple[int, ...]
    answers: tuple[int, ...]

    def requests(self, vocab_size: int, salt: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Return random prompts, different for every salt, and options for greedy answers of exactly these lengths."""
        rng = np.random.default_rng((salt, len(self.prompts)))
        return ([rng.integers(0, vocab_size, length).tolist() for length in self.prompts],
                [SamplingParams(max_tokens=length, temperature=0.0, repetition_penalty=1.0, ignore_eos=True)
                 for length in self.answers])


def trace(name: str, seed: int, max_seq_len: int, share: float = 1.0) -> Trace:
    """Draw request lengths of a load in `LOADS`, up to the engine's maximum, for a share of its requests."""
    return of_load(name, LOADS[name], seed + 1000 * list(LOADS).index(name), max_seq_len, share)


def of_load(name: str, load: Load, seed: int, max_seq_len: int, share: float = 1.0) -> Trace:
    """Draw request lengths of a load that need not be in `LOADS`; see `trace`."""
    rng = np.random.default_rng(seed)
    count = max(1, round(load.requests * share))
    low, high = np.log(load.prompt[0]), np.log(load.prompt[1] + 1)
    prompts = np.exp(rng.uniform(low, high, count)).astype(int)
    answers = rng.integers(load.answer[0], load.answer[1] + 1, count)
    prompts = np.clip(prompts, 1, max(1, max_seq_len * 3 // 4))
    answers = np.clip(answers, 1, max_seq_len - prompts)
    return Trace(name, tuple(map(int, prompts)), tuple(map(int, answers)))


def traces(seed: int, max_seq_len: int, share: float = 1.0) -> list[Trace]:
    """Draw request lengths of every load in `LOADS`; see `trace`."""
    return [trace(name, seed, max_seq_len, share) for name in LOADS]
