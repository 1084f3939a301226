"""Measure the engine's own Python time per decode step of 32 sequences: a stub replaces the compiled program.

    python scripts/bench/host.py [--rows 32] [--steps 2000]
"""
import argparse
import statistics
import time

import numpy as np

from qwen_jax import SamplingParams
from qwen_jax.engine.compiled.sampler import Sampled
from qwen_jax.engine.compiled.state import StepOutput
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.scheduling.buckets import Limits

BAR_MS = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    limits = Limits(args.rows, 4096, ((32, 64),), (), (args.rows,))
    engine = Engine.without_weights("qwen2.5-0.5b", limits=limits, cache_dir=None, kv_cache_bytes=1 << 34)
    runner, rng = engine.runner, np.random.default_rng(0)
    runner._compiles_at_warmup = 0  # the engine takes itself for warmed up; no program will run
    runner.programs.available.update(runner.table)

    def stub(bucket, batch, version):
        rows = bucket.rows
        sampled = Sampled(np.full((rows, 1), 7, np.int32), np.zeros((rows, 1), np.float32),
                          np.zeros((rows, 1, 20), np.int32), np.zeros((rows, 1, 20), np.float32))
        counts = batch.samples.astype(np.int32) if bucket.phase == "prefill" else batch.counts
        return StepOutput(sampled, counts, None, np.zeros((rows, 2), np.int32),
                          np.zeros(rows, np.int32))

    runner.start = stub
    params = SamplingParams(max_tokens=4000, temperature=0.7, top_p=0.9, ignore_eos=True)
    prompts = rng.integers(0, 1000, (args.rows, 40)).tolist()
    requests = [engine.input_processor.requests(prompt, params)[0] for prompt in prompts]
    engine.core.submit(requests)
    while not all(request.sequence.output for request in requests):
        engine.core.step()
    times = []
    for _ in range(min(args.steps, 3900)):
        began = time.perf_counter()
        engine.core.step()
        times.append((time.perf_counter() - began) * 1e3)
    ms = statistics.median(times)
    print(f"{args.rows} rows: {ms:.2f} ms a step (median of {len(times)}; 90 %: {np.quantile(times, .9):.2f}); "
          f"bar {BAR_MS}: {'met' if ms <= BAR_MS else 'missed'}")


if __name__ == "__main__":
    main()
