"""Synthetic traces of requests: in bursts, from a few large tenants and many small ones, with heavy tails."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from qwen_kernels.page import PAGE

from qwen_jax.errors import UserError

CONTEXT, MAX_OUTPUT = 32_768, 1024  # tokens: Qwen2.5's context, and the longest answer
TENANTS = 100
CALM_SECONDS, BURST_SECONDS, BURST = 8.0, 2.0, 4.0  # mean durations; rate in a burst, as a multiple of the calm rate


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request of a trace.

    Attributes:
      arrival: time of arrival, in seconds from the trace's beginning.
      prompt_tokens: length of the prompt.
      output_tokens: length of the answer.
      blocks: keys of the prompt's full blocks of 64 tokens.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[Hashable, ...] = ()


def skewed_trace(requests: int, rate: float, seed: int) -> list[TraceRequest]:
    """Return a synthetic trace of ``requests`` requests, which arrive at ``rate`` per second on average.

    A prompt is its tenant's system prompt (log-normal over tenants, median 500 tokens, sigma 1), which a prefix cache
    can hold, and a part of its own (log-normal, median 100, sigma 2.2); each is at most half of the context that the
    longest answer leaves. There are 100 tenants, drawn by Zipf's law with exponent 1.1. Answers are log-normal (median
    60, sigma 1, at most 1,024). Arrivals are a Poisson process with two rates: bursts of 2 s on average, with four
    times the rate of the 8 s between them.

    Lengths depend only on the seed and the place in the trace: a shorter trace, or a trace at another rate, has the
    same requests.
    """
    if requests < 1 or not rate > 0:
        raise UserError(f"requests of a trace must be 1 or more and rate more than 0, not {requests} and {rate}")
    times, of_tenants, owners, of_requests, answers = np.random.default_rng(seed).spawn(5)
    longest = (CONTEXT - MAX_OUTPUT) // 2
    systems = _lengths(of_tenants, 500, 1.0, TENANTS, longest)
    shares = np.arange(1, TENANTS + 1) ** -1.1
    tenant = owners.choice(TENANTS, requests, p=shares / shares.sum())
    # Keys of system prompts are below 0, those of the requests' own blocks from 0 on.
    system_blocks = [tuple(range(-first - length // PAGE, -first)) for first, length in
                     zip(1 + np.cumsum([0, *systems[:-1]]), systems)]
    trace, next_key = [], 0
    for arrival, owner, own_tokens, output in zip(
            bursty_arrivals(requests, rate, times).tolist(), tenant.tolist(),
            _lengths(of_requests, 100, 2.2, requests, longest), _lengths(answers, 60, 1.0, requests, MAX_OUTPUT)):
        shared, length = system_blocks[owner], systems[owner] + own_tokens
        own_blocks = length // PAGE - len(shared)
        trace.append(TraceRequest(arrival, length, output, (*shared, *range(next_key, next_key + own_blocks))))
        next_key += own_blocks
    return trace


def _lengths(rng: np.random.Generator, median: float, sigma: float, count: int, longest: int) -> list[int]:
    return np.clip(rng.lognormal(np.log(median), sigma, count), 1, longest).astype(int).tolist()


def bursty_arrivals(requests: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Return the times, in seconds and rising, at which requests arrive in bursts: float [requests].

    They are drawn from a Markov-modulated Poisson process that begins between two bursts.
    """
    calm_rate = rate * (CALM_SECONDS + BURST_SECONDS) / (CALM_SECONDS + BURST * BURST_SECONDS)
    parts, count, now, bursting = [], 0, 0.0, False
    while count < requests:
        length = rng.exponential(BURST_SECONDS if bursting else CALM_SECONDS)
        number = rng.poisson(length * calm_rate * (BURST if bursting else 1.0))
        parts.append(np.sort(rng.uniform(now, now + length, number)))
        count, now, bursting = count + number, now + length, not bursting
    return np.concatenate(parts)[:requests]
