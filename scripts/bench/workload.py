"""Shared parts of the benchmarks: model shapes, a trace of requests, a peer in another process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qwen_jax import ModelConfig, SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and the exact number of tokens to generate."""

    prompt: list[int]
    tokens: int

    @property
    def params(self) -> SamplingParams:
        return exactly(self.tokens)


def exactly(tokens: int) -> SamplingParams:
    """Return sampling parameters for a greedy answer of exactly `tokens` tokens."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def shape(preset: str, layers: int | None) -> ModelConfig:
    """Return the model configuration of a preset, with `layers` layers instead of its own if a number is given."""
    config = ModelConfig.preset(preset)
    return replace(config, num_layers=layers) if layers else config


def token_ids(rng: np.random.Generator, count: int, vocab_size: int = 150_000) -> list[int]:
    return rng.integers(1, vocab_size, count).tolist()


def trace(requests: int, seed: int, round_: int = 0, prompt: tuple[int, int] = (16, 1024),
          output: tuple[int, int] = (1, 128)) -> list[Request]:
    """Draw requests with log-uniform prompt lengths and uniform output lengths; the seed alone decides the lengths.

    Token ids also depend on the round, so that a prefix cache finds nothing from the round before.
    """
    lengths, ids = np.random.default_rng(seed), np.random.default_rng((seed, round_))
    prompts = np.exp(lengths.uniform(np.log(prompt[0]), np.log(prompt[1] + 1), requests)).astype(int)
    outputs = lengths.integers(output[0], output[1] + 1, requests)
    return [Request(token_ids(ids, size), int(tokens)) for size, tokens in zip(prompts, outputs)]


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Peer:
    """A process in which another environment's Python runs a script of this folder that answers lines of JSON."""

    def __init__(self, python: str, script: str) -> None:
        command = python, "-P", str(Path(__file__).with_name(script))  # -P: do not import from this folder
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question) -> dict:
        """Send the arguments to the process as a line of JSON; return the JSON object that it answers."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._process.args[-1]} ended with status {self._process.wait()}: see above")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def say(text: str) -> None:
    """Print a line of progress to stderr."""
    print(f"  {text}", file=sys.stderr, flush=True)
