"""Measure the time that sparse attention saves an engine: prefill of a long prompt, and decode of eight answers to it.

    python scripts/bench/sparse_engine.py [--tokens 32768] [--layers 4] [--rounds 1]

0.5B shape with fewer layers, random weights, bf16. The engines run the same prompt in turn; the rows of a decode step
share its pages, so full attention reads less than with separate prompts. Medians of rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
from qwen_kernels.attention import PAGE  # noqa: E402
from workload import exactly, say, seconds, shape, token_ids  # noqa: E402

from qwen_jax import Engine  # noqa: E402
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy
from qwen_jax.model import init  # noqa: E402

ROWS, ANSWER = 8, 17


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    model = init(shape("qwen2.5-0.5b", args.layers), 0, "bfloat16")
    longest = args.tokens + PAGE
    limits = Limits(max_batch_size=ROWS, max_seq_len=longest, prefill_shapes=((1, 64), (1, 512)),
                    recompute_shapes=(), decode_rows=(ROWS,))
    token_bytes = model.config.num_layers * model.config.num_kv_heads * model.config.head_dim * 2 * 2
    engines = {name: Engine(model, warmup="full", limits=limits, kv_cache_bytes=4 * longest * token_bytes,
                            progress=False,
                            policy=SchedulePolicy(sparse_above_tokens=threshold))
               for name, threshold in (("full", 1 << 30), ("sparse", 2048))}
    say("engines ready")
    prefill, decode = ({name: [] for name in engines} for _ in range(2))
    for round_ in range(args.rounds):
        prompt = token_ids(np.random.default_rng(round_), args.tokens)
        for name, engine in engines.items():
            prefill[name].append(seconds(partial(engine.generate, [prompt], exactly(1))))
            before = decode_usage(engine)
            engine.generate([prompt] * ROWS, exactly(ANSWER))  # the prefix cache has the prompt's pages
            after = decode_usage(engine)
            decode[name].append((after[1] - before[1]) / (after[0] - before[0]))
            say(f"{name}: prefill {prefill[name][-1]:.1f} s, decode step {1e3 * decode[name][-1]:.0f} ms")
    for what, times in (("prefill", prefill), (f"decode step of {ROWS} rows", decode)):
        full, sparse = (statistics.median(times[name]) for name in ("full", "sparse"))
        print(f"{args.tokens} tokens, {args.layers} layers, {what}: full {full:.3f} s, sparse {sparse:.3f} s, "
              f"{full / sparse:.2f} x")
    print(f"density {engines['sparse'].stats().sparse_density:.3f}")
    return 0


def decode_usage(engine: Engine) -> tuple[int, float]:
    """Return the number of decode steps that the engine has run so far, and the seconds that they took."""
    buckets = [bucket for bucket in engine.stats().buckets if bucket.bucket.startswith("decode")]
    return sum(bucket.steps for bucket in buckets), sum(bucket.seconds for bucket in buckets)


if __name__ == "__main__":
    sys.exit(main())
