"""Compare the time of a decode step with that of reading the weights once at the machine's memory bandwidth.

    python scripts/bench/decode_bandwidth.py [--batches 8,32] [--rounds 5] [--tokens 96]

Bars: a step takes at most 2.6 times as long at 8 rows, 3.3 times at 32 rows. 0.5B shape, random weights, bf16, contexts
of 80-176 tokens. A step's time is that of long answers less that of short answers, divided by the extra tokens;
prefills are taken out of both, scheduling and delivery count. Bandwidth is measured just before each step: the best of
several ways to read as many bytes as the weights have, each tried three times. Other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from workload import exactly, say, seconds, shape, token_ids  # noqa: E402

from qwen_jax import Engine  # noqa: E402
from qwen_jax.model import init  # noqa: E402

BARS = {8: 2.6, 32: 3.3}
PROMPT, SHORT = 64, 16  # tokens of a prompt, and of a short answer: by its end every row decodes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="decode steps per measurement")
    parser.add_argument("--preset", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    config = shape(args.preset, args.layers)
    weights = 2 * config.num_parameters  # bytes; a tied embedding is read whole, as the head
    engine = Engine(init(config, 0, "bfloat16"), warmup="full", max_batch_size=max(batches),
                    max_seq_len=PROMPT + SHORT + args.tokens,
                    prefix_cache=False)
    methods = readers(weights)

    rng = np.random.default_rng(0)
    measured = {batch: [] for batch in batches}  # (step, reading the weights), in seconds
    for batch in batches * args.rounds:
        reading, method = min((seconds(read), name) for name, read in methods.items() for _ in range(3))
        step = decode(engine, rng, batch, args.tokens)
        say(f"{batch} rows: step {step * 1e3:.1f} ms, {weights / reading / 1e9:.1f} GB/s ({method})")
        measured[batch].append((step, reading))
    failed = False
    print(f"weights: {weights / 1e9:.2f} GB; medians of {args.rounds} rounds")
    print(f"{'rows':>4} {'step ms':>9} {'GB/s':>6} {'reading ms':>10} {'ratio':>6} {'bar':>4}")
    for batch, rounds in measured.items():
        step, reading = (statistics.median(column) for column in zip(*rounds))
        ratio = statistics.median(step / reading for step, reading in rounds)
        failed |= ratio > BARS.get(batch, ratio)
        print(f"{batch:4} {step * 1e3:9.1f} {weights / reading / 1e9:6.1f} {reading * 1e3:10.1f} "
              f"{ratio:6.2f} {BARS.get(batch, ''):>4}")
    if failed:
        print("a step takes longer than its bar allows", file=sys.stderr)
    return int(failed)


def decode(engine: Engine, rng: np.random.Generator, batch: int, tokens: int) -> float:
    """Return the seconds that the engine takes per decode step of ``batch`` sequences, without prefill."""
    prompts = [token_ids(rng, PROMPT, engine.config.vocab_size) for _ in range(batch)]

    def decoding(count: int) -> float:
        before = prefilling(engine)
        took = seconds(lambda: engine.generate(prompts, exactly(count)))
        return took - (prefilling(engine) - before)

    return (decoding(SHORT + tokens) - decoding(SHORT)) / tokens


def prefilling(engine: Engine) -> float:
    """Return the seconds that the engine has spent in prefill steps so far."""
    return sum(bucket.seconds for bucket in engine.stats().buckets if bucket.bucket.startswith("prefill/"))


def readers(size: int) -> dict:
    """Return functions, by name, that each read ``size`` bytes of memory once with all cores."""
    cores = os.cpu_count()
    words = np.random.default_rng(0).integers(0, 2**62, size // 8)
    pool = ThreadPoolExecutor(cores)  # numpy lets go of the interpreter's lock
    parts = np.array_split(words, cores)
    matrix = jnp.ones((size // 4 // 1024, 1024), jnp.float32)
    vector = jnp.ones(1024, jnp.float32)
    matvec = jax.jit(lambda m, v: m @ v)
    methods = {
        "numpy max, a thread for each core": lambda: list(pool.map(np.max, parts)),
        "XLA float32 matrix by vector": lambda: matvec(matrix, vector).block_until_ready(),
    }
    try:
        import torch
    except ImportError:
        return methods
    torch.set_num_threads(cores)
    tensor = torch.from_numpy(words)
    floats = torch.ones(size // 4)
    return methods | {"torch max of int64": tensor.max, "torch sum of float32": floats.sum}


if __name__ == "__main__":
    sys.exit(main())
