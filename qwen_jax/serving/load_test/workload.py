"""What a load consists of: how many requests, when each arrives, and what it asks."""

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
    """What is asked, and how often. UserError for what cannot be.

    Attributes:
      requests, seconds: how many, or for how long they arrive; one of the two.
      words: of each synthetic prompt. Prompts differ, so that no prefix cache knows them.
      prompts: a JSONL file in their place, of ``{"prompt": text}`` or ``{"messages": [...]}``; taken in order, and
        again from the start.
      ignore_eos: answers of ``max_tokens`` tokens, from servers that know vLLM's field.
      warmup: requests sent first, all at once, and not counted.
      seed: the same arrivals and prompts again. Those of another rate differ.
      model: None for the first that the server lists.
      timeout: seconds from sending a request until it is given up.
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
                raise UserError(f"{name} is a positive number, not {value:g}")
        for name in ("warmup", "seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"{name} cannot be negative, and is {value}")
        if self.endpoint not in PATHS:
            raise UserError(f"the endpoint is one of {', '.join(PATHS)}, not {self.endpoint}")


def parse_rates(text: str) -> list[float]:
    """``5,10,inf`` as requests per second; UserError."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"rates are requests per second, such as 5 or 5,10,20,inf, not {text!r}") from None
    for rate in rates:
        _check_rate(rate)
    if len(set(rates)) < len(rates):
        raise UserError(f"a rate is given twice: {text}")
    return rates


def arrivals(load: Load, rate: float) -> np.ndarray:
    """When requests arrive at ``rate`` per second: float64 seconds, ascending. All at 0 for ``inf``. UserError."""
    _check_rate(rate)
    random = _random(load, rate, 0)
    if load.requests is not None:
        return np.cumsum(random.exponential(1 / rate, load.requests))
    if rate == math.inf:
        raise UserError("the rate inf is all requests at once: give their number, not seconds")
    # Given how many there are, arrivals of a Poisson process are uniform.
    times = np.sort(random.uniform(0, load.seconds, random.poisson(rate * load.seconds)))
    if not len(times):
        raise UserError(f"no request arrives within {load.seconds:g} s at {rate:g} per second: take a longer time")
    return times


def inputs(load: Load, rate: float, count: int) -> list[dict[str, Any]]:
    """Of each request, the prompt or the messages. UserError."""
    if load.prompts is not None:
        found = _read(load.prompts, load.endpoint)
        return [found[number % len(found)] for number in range(count)]
    chosen = _random(load, rate, 1).integers(len(WORDS), size=(count, load.words))
    return [_input(" ".join(WORDS[word] for word in row), load.endpoint) for row in chosen.tolist()]


def _input(text: str, endpoint: str) -> dict[str, Any]:
    return {"prompt": text} if endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}


def _read(path: str, endpoint: str) -> list[dict[str, Any]]:
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"the prompts cannot be read: {error.strerror}: {path}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise UserError(f"{path}, line {number}, is no JSON: {error}") from error
        match value:
            case {"prompt": str(text)}:
                found.append(_input(text, endpoint))
            case {"messages": list(messages)} if endpoint == "chat":
                found.append({"messages": messages})
            case {"messages": list()}:
                raise UserError(f"{path}, line {number}, has messages, which only the chat endpoint takes")
            case _:
                raise UserError(f'{path}, line {number}, is neither {{"prompt": text}} nor {{"messages": [...]}}')
    if not found:
        raise UserError(f"there is no prompt in {path}")
    return found


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise UserError(f"a rate is a positive number of requests per second, or inf, not {rate:g}")


def _random(load: Load, rate: float, use: int) -> np.random.Generator:
    return np.random.default_rng(None if load.seed is None else [load.seed, use, *struct.pack("d", rate)])
