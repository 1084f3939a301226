"""Requests as traffic brings them: in bursts, from a few large tenants and many small ones, with heavy tails."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from qwen_jax.cluster.routing.policies import BLOCK
from qwen_jax.errors import UserError

CONTEXT, MOST_OUTPUT = 32_768, 1024  # tokens: Qwen2.5's context, and the most that an answer takes of it
CALM_SECONDS, BURST_SECONDS, BURST = 8.0, 2.0, 4.0  # how long each lasts on average; the rate of one to the other


@dataclass(frozen=True, slots=True)
class Request:
    """When it arrives (seconds), lengths of prompt and answer (tokens), and the keys of the prompt's full blocks."""

    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[Hashable, ...] = ()


def skewed_trace(requests: int, rate: float, seed: int, *, tenants: int = 100, tail: float = 2.2) -> list[Request]:
    """``requests`` requests of which ``rate`` arrive per second on average.

    A prompt is its tenant's system prompt (log-normal over tenants, median 500 tokens, sigma 1), which a prefix cache
    can have, and a part of its own (log-normal, median 100, sigma ``tail``); each is at most half of the context that
    the longest answer leaves. Tenants are drawn by Zipf's law with exponent 1.1. Answers are log-normal (median 60,
    sigma 1, at most 1,024). Arrivals are a Poisson process with two rates: bursts of 2 s on average, with four times
    the rate of the 8 s between them.

    Lengths depend on the seed and the place in the trace alone: half as many requests, or at twice the rate, are the
    same requests.
    """
    if requests < 1 or not rate > 0 or tenants < 1 or tail < 0:
        raise UserError(f"a trace needs requests, a rate and tenants, not requests={requests}, rate={rate}, "
                        f"tenants={tenants}, tail={tail}")
    times, of_tenants, whose, own, answers = np.random.default_rng(seed).spawn(5)
    most = (CONTEXT - MOST_OUTPUT) // 2
    systems = _lengths(of_tenants, 500, 1.0, tenants, most)
    shares = np.arange(1, tenants + 1) ** -1.1
    tenant = whose.choice(tenants, requests, p=shares / shares.sum())
    blocks_of = [tuple(range(-first - length // BLOCK, -first)) for first, length in
                 zip(1 + np.cumsum([0, *systems[:-1]]), systems)]  # below 0; those of requests alone are above
    trace, key = [], 0
    for arrival, who, mine, output in zip(
            bursty_arrivals(requests, rate, times).tolist(), tenant.tolist(),
            _lengths(own, 100, tail, requests, most), _lengths(answers, 60, 1.0, requests, MOST_OUTPUT)):
        shared, length = blocks_of[who], systems[who] + mine
        alone = length // BLOCK - len(shared)
        trace.append(Request(arrival, length, output, (*shared, *range(key, key + alone))))
        key += alone
    return trace


def _lengths(rng: np.random.Generator, median: float, sigma: float, count: int, most: int) -> list[int]:
    return np.clip(rng.lognormal(np.log(median), sigma, count), 1, most).astype(int).tolist()


def bursty_arrivals(requests: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds, rising: float [requests]. A Markov-modulated Poisson process that begins calm."""
    calm_rate = rate * (CALM_SECONDS + BURST_SECONDS) / (CALM_SECONDS + BURST * BURST_SECONDS)
    parts, count, now, bursting = [], 0, 0.0, False
    while count < requests:
        length = rng.exponential(BURST_SECONDS if bursting else CALM_SECONDS)
        number = rng.poisson(length * calm_rate * (BURST if bursting else 1.0))
        parts.append(np.sort(rng.uniform(now, now + length, number)))
        count, now, bursting = count + number, now + length, not bursting
    return np.concatenate(parts)[:requests]
