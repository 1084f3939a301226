"""Time classification of prompts that share a long instruction, by an engine with the prefix cache and one without.

    python scripts/bench/prefix.py [--prompts 16] [--rounds 3]

0.5B shape, random weights, bf16, 512 shared tokens and tails of 32, two labels of one token. Every round has its own
instruction and tails, so the prefix cache finds nothing from the round before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402

from qwen_jax import Engine, ModelConfig  # noqa: E402
from qwen_jax.model import init  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    config = ModelConfig.preset("qwen2.5-0.5b")
    config = replace(config, num_layers=args.layers)
    model = init(config, 0, "bfloat16")
    engines = {on: Engine(model, warmup="full", max_batch_size=args.prompts, max_seq_len=640, prefix_cache=on)
               for on in (True, False)}
    times, tokens = {True: [], False: []}, {}
    for round_ in range(args.rounds):
        rng = np.random.default_rng(round_)
        instruction = rng.integers(0, 150_000, 512).tolist()
        prompts = [instruction + rng.integers(0, 150_000, 32).tolist() for _ in range(args.prompts)]
        for on, engine in engines.items():
            before = sum(bucket.tokens for bucket in engine.stats().buckets)
            began = time.perf_counter()
            engine.classify(prompts, [[5], [6]])
            times[on].append(time.perf_counter() - began)
            tokens[on] = sum(bucket.tokens for bucket in engine.stats().buckets) - before
            print(f"  round {round_} prefix cache {on}: {times[on][-1]:.1f} s", file=sys.stderr)
    cached, uncached = (statistics.median(times[on]) for on in (True, False))
    print(f"{args.prompts} prompts of 512 + 32 tokens, two labels: {cached:.2f} s with the prefix cache "
          f"({tokens[True]} tokens computed), {uncached:.2f} s without ({tokens[False]}): {uncached / cached:.1f} x")


if __name__ == "__main__":
    main()
