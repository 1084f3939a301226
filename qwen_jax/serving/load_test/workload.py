"""Requests of a load test: their number, arrival times and prompts."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from qwen_jax.errors import UserError

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
WORDS = ("time year people way day man thing woman life child world school state family student group country problem "
         "hand part place case week company system program question work number night point home water room mother "
         "area money story fact month lot right study book eye job word business issue side kind head house service "
         "friend father power hour game line end member law car city name team minute idea body back parent face "
         "level office door health person art war history party result change morning reason research girl").split()


@dataclass(frozen=True)
class Load:
    """Description of a load test: number of requests, prompts, options. UserError for a value out of range.

    Attributes:
      requests: number of requests; None where ``seconds`` is given.
      seconds: length of the time in which requests arrive; None where ``requests`` is given.
      words: number of words of a synthetic prompt. Prompts differ, so that no prefix cache knows them.
      prompts: JSONL file in place of synthetic prompts, with ``{"prompt": text}`` or ``{"messages": [...]}`` on each
        line; taken in order, and from the start again.
      max_tokens: largest number of tokens of an answer.
      ignore_eos: whether answers have exactly ``max_tokens`` tokens, from servers that know vLLM's field.
      endpoint: route that the requests are sent to.
      warmup: number of requests that are sent first, all at once, and not counted.
      seed: seed of arrivals and prompts, which also depend on the rate; None for a random one.
      model: name of the model; None for the first that the server lists.
      api_key: the server's API key, if it needs one.
      timeout: seconds from the sending of a request until it is given up.
    """

    requests: int | None = None
    seconds: float | None = None
    words: int = 128
    prompts: str | None = None
    max_tokens: int = 64
    ignore_eos: bool = False
    endpoint: Literal["chat", "completions"] = "chat"
    warmup: int = 4
    seed: int | None = None
    model: str | None = None
    api_key: str | None = None
    timeout: float = 600

    def __post_init__(self) -> None:
        if (self.requests is None) == (self.seconds is None):
            raise UserError("give either a number of requests or a number of seconds")
        for name in ("requests", "seconds", "words", "max_tokens", "timeout"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number, not {value:g}")
        for name in ("warmup", "seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"{name} must be at least 0, not {value}")
        if self.endpoint not in PATHS:
            raise UserError(f"endpoint must be one of {', '.join(PATHS)}, not {self.endpoint}")


def parse_rates(text: str) -> list[float]:
    """Parse rates such as ``5,10,inf`` into numbers of requests per second; UserError if malformed."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"rates must be requests per second, such as 5 or 5,10,20,inf, not {text!r}") from None
    for rate in rates:
        _check_rate(rate)
    if len(set(rates)) < len(rates):
        raise UserError(f"rates must differ from each other, but one is given twice in {text}")
    return rates


def arrivals(load: Load, rate: float) -> np.ndarray:
    """Draw the requests' arrival times, a Poisson process of ``rate`` per second: float64 seconds, ascending.

    At the rate ``inf`` all arrive at 0. UserError when no request arrives, or for ``inf`` with a number of seconds.
    """
    _check_rate(rate)
    random = _random(load, rate, stream=0)
    if load.requests is not None:
        return np.cumsum(random.exponential(1 / rate, load.requests))
    if rate == math.inf:
        raise UserError("the rate inf sends all requests at once: give a number of requests, not of seconds")
    # Given their number, the arrivals of a Poisson process are uniform.
    times = np.sort(random.uniform(0, load.seconds, random.poisson(rate * load.seconds)))
    if not len(times):
        raise UserError(f"no request arrives within {load.seconds:g} s at {rate:g} per second: take a longer time")
    return times


def inputs(load: Load, rate: float, count: int) -> list[dict[str, Any]]:
    """Return the prompt or the messages of ``count`` requests, as fields of their bodies. UserError for a bad file."""
    if load.prompts is not None:
        prompts = _read(load.prompts, load.endpoint)
        return [prompts[number % len(prompts)] for number in range(count)]
    chosen = _random(load, rate, stream=1).integers(len(WORDS), size=(count, load.words))
    return [_input(" ".join(WORDS[word] for word in row), load.endpoint) for row in chosen.tolist()]


def _input(text: str, endpoint: str) -> dict[str, Any]:
    return {"prompt": text} if endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}


def _read(path: str, endpoint: str) -> list[dict[str, Any]]:
    """Read a JSONL file of prompts; return each as the field that a request's body has for it."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"the prompts cannot be read: {error.strerror}: {path}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise UserError(f"{path}, line {number}, must be JSON: {error}") from error
        match value:
            case {"prompt": str(text)}:
                prompts.append(_input(text, endpoint))
            case {"messages": list(messages)} if endpoint == "chat":
                prompts.append({"messages": messages})
            case {"messages": list()}:
                raise UserError(f"{path}, line {number}, has messages, which only the chat endpoint takes")
            case _:
                raise UserError(f'{path}, line {number}, must be {{"prompt": text}} or {{"messages": [...]}}')
    if not prompts:
        raise UserError(f"{path} must have a prompt per line, and has no prompt")
    return prompts


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise UserError(f"a rate must be a positive number of requests per second, or inf, not {rate:g}")


def _random(load: Load, rate: float, stream: int) -> np.random.Generator:
    """Return a random generator seeded with the load's seed, the rate and ``stream``, a number for its purpose."""
    return np.random.default_rng(None if load.seed is None else [load.seed, stream, *struct.pack("d", rate)])
