"""Compare int8 and int4 weights with bfloat16 weights and with llama.cpp: prefill, and decode of several streams.

    python scripts/bench/integer_weights.py MODEL [--python ENV/bin/python] [--gguf FILE] [--streams 1,8,32]

All sides alternate in one run. llama.cpp reads a Q8_0 that is exported from MODEL, and FILE, a Q4_K_M of the same
model. Prefill is the time from one prompt of 1,024 tokens to its first token. Decode is the time of 33 tokens less that
of one, after prompts of 32 tokens. Printed are tokens per second, medians of `--rounds`, and ratios to the other sides.
ENV has xllamacpp; without `--python` there is no llama.cpp.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
from qwen_kernels.cpu import instruction_set  # noqa: E402
from workload import Peer, exactly, say, seconds, token_ids  # noqa: E402

from qwen_jax import Engine  # noqa: E402
from qwen_jax.checkpoint import export_gguf  # noqa: E402

RATIOS = (("int8", "bfloat16"), ("int4", "bfloat16"), ("int8", "llama.cpp Q8_0"), ("int4", "llama.cpp Q4_K_M"))
PREFILL, PROMPT, TOKENS, CONTEXT = 1024, 32, 32, 1280
Time = Callable[[list[list[int]], int], float]  # (prompts, tokens of each answer) -> seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--python", help="the Python of an environment with xllamacpp")
    parser.add_argument("--gguf", help="a Q4_K_M of the model, for llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="1,8,32")
    args = parser.parse_args()
    streams = [int(count) for count in args.streams.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        sides = {weights or "bfloat16": ours(args.model, weights, max(streams)) for weights in (None, "int8", "int4")}
        say(f"our kernels use {instruction_set()}")
        if args.python:
            exported = export_gguf(args.model, Path(scratch) / "model.gguf", "q8_0")
            sides["llama.cpp Q8_0"] = llama_cpp(args.python, str(exported), max(streams))
            if args.gguf:
                sides["llama.cpp Q4_K_M"] = llama_cpp(args.python, args.gguf, max(streams))
        print(f"{'':<20}" + "".join(f"{name:>18}" for name in sides)
              + "".join(f"{one + ' / ' + other:>26}" for one, other in RATIOS if other in sides))
        prefill = Case(f"prefill {PREFILL}", 1, PREFILL, PREFILL, lambda time, prompts: time(prompts, 1))
        report(prefill, sides, args.rounds)
        for count in streams:
            report(Case(f"decode, {count} streams", count, PROMPT, TOKENS * count,
                        lambda time, prompts: time(prompts, TOKENS + 1) - time(prompts, 1)), sides, args.rounds)


class Case(NamedTuple):
    """A case to measure: prompts of a length, and how many tokens count in the time that ``measure`` takes."""

    title: str
    prompts: int
    length: int
    tokens: int
    measure: Callable[[Time, list[list[int]]], float]


def ours(model: str, weights: str | None, rows: int) -> Time:
    """Return a function that times an engine's answers."""
    engine = Engine.from_pretrained(model, dtype="bfloat16", weights=weights, max_batch_size=rows, max_seq_len=CONTEXT,
                                    warmup="full", prefix_cache=False, progress=False)
    say(f"engine with {weights or 'bfloat16'} ready")
    return lambda prompts, tokens: seconds(lambda: engine.generate(prompts, exactly(tokens)))


def llama_cpp(python: str, gguf: str, streams: int) -> Time:
    """Return a function that times llama.cpp's answers."""
    peer = Peer(python, "xllamacpp_runner.py")
    peer.ask(gguf=gguf, context=CONTEXT, parallel=streams)
    return lambda prompts, tokens: peer.ask(prompts=prompts, tokens=tokens)["seconds"]


def report(case: Case, sides: dict[str, Time], rounds: int) -> None:
    """Measure all sides in turn, and print a line of tokens per second and of ratios."""
    rng, times = np.random.default_rng(0), {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, time in sides.items():
            taken = case.measure(time, [token_ids(rng, case.length) for _ in range(case.prompts)])
            if round_:  # the first is a warm-up
                times[name].append(taken)
    rates = {name: case.tokens / statistics.median(taken) for name, taken in times.items()}
    print(f"{case.title:<20}" + "".join(f"{rate:>18.1f}" for rate in rates.values())
          + "".join(f"{rates[one] / rates[other]:>24.2f} x" for one, other in RATIOS if other in rates), flush=True)


if __name__ == "__main__":
    sys.exit(main())
