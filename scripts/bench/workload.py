"""What the serving benchmarks share: shapes, a trace of requests, a peer in a process of its own."""

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
    prompt: list[int]
    tokens: int  # to generate: neither fewer nor more

    @property
    def params(self) -> SamplingParams:
        return exactly(self.tokens)


def exactly(tokens: int) -> SamplingParams:
    """Greedy, and no token ends the answer early."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def shape(preset: str, layers: int | None) -> ModelConfig:
    """A preset, with fewer layers to try a script out."""
    config = ModelConfig.preset(preset)
    return replace(config, num_layers=layers) if layers else config


def token_ids(rng: np.random.Generator, count: int, vocab_size: int = 150_000) -> list[int]:
    return rng.integers(1, vocab_size, count).tolist()


def trace(requests: int, seed: int, round_: int = 0, prompt: tuple[int, int] = (16, 1024),
          output: tuple[int, int] = (1, 128)) -> list[Request]:
    """Prompt lengths are log-uniform and output lengths uniform, by the seed alone.

    Token ids are the round's own, so that a prefix cache finds nothing from the round before.
    """
    lengths, ids = np.random.default_rng(seed), np.random.default_rng((seed, round_))
    prompts = np.exp(lengths.uniform(np.log(prompt[0]), np.log(prompt[1] + 1), requests)).astype(int)
    outputs = lengths.integers(output[0], output[1] + 1, requests)
    return [Request(token_ids(ids, size), int(tokens)) for size, tokens in zip(prompts, outputs)]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Peer:
    """A script beside this one, run by another environment's Python: one JSON object per line to it, one back."""

    def __init__(self, python: str, script: str) -> None:
        command = python, "-P", str(Path(__file__).with_name(script))  # -P: what it imports is not in this folder
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question) -> dict:
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
    print(f"  {text}", file=sys.stderr, flush=True)
