"""Compare programs of different numbers of layers: CPU seconds to compile two buckets, and the time of their steps.

    python scripts/bench/layers_per_program.py [--preset qwen2.5-0.5b] [--layers 24] [--blocks 1 4 8 24]
        [--dtype bfloat16] [--fp8] [--sparse] [--adapters] [--drafts] [--steps 15]

The weights are zeros, which takes as long. One process has the engines of all block sizes; their steps alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax import Engine, ModelConfig
from qwen_jax.engine.runner.padded_batch import dry_run_batch
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import SPARSE, SchedulePolicy
from qwen_jax.model import abstract, build

CONTEXT = 500  # tokens before those of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 8, 24])
    parser.add_argument("--dtype", default="bfloat16")
    for name in ("fp8", "sparse", "adapters", "drafts"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    config = replace(config, num_layers=args.layers or config.num_layers)
    model = build(config, {path: jnp.zeros(spec.shape, spec.dtype) for path, spec in
                           abstract(config, args.dtype).items()})
    engines = {}
    for block in args.blocks:
        engines[block], seconds = compiled(model, block, args)
        name = f"whole steps of {config.num_layers}" if block >= config.num_layers else f"blocks of {block}"
        print(f"{name}: {len(engines[block].runner.executables.programs)} programs, {seconds:.1f} CPU s", flush=True)
    for bucket in engines[args.blocks[0]].runner.table:
        if args.sparse and bucket.schedule != SPARSE:
            continue
        times: dict[int, list[float]] = {block: [] for block in engines}
        for _ in range(args.steps + 2 if bucket.phase == "decode" else 4):
            for block, engine in engines.items():
                times[block].append(step(engine, bucket))
        medians = {block: statistics.median(values[2:]) for block, values in times.items()}
        least = medians[max(engines)]
        print(f"{bucket}: " + ", ".join(f"{block}: {ms:.1f} ms ({ms / least:.3f})" for block, ms in medians.items()),
              flush=True)


def compiled(model: Any, block: int, args: argparse.Namespace) -> tuple[Engine, float]:
    """Return an engine whose programs have ``block`` layers, and the CPU seconds that they took to compile."""
    drafts = {"draft_tokens": 4} if args.drafts else {}
    limits = Limits(8, 1024, prefill_shapes=((1, 64), (1, 256)), recompute_shapes=(), decode_rows=(2, 8), **drafts)
    options = {"policy": SchedulePolicy(sparse_above_tokens=256)} if args.sparse else {}
    if args.drafts:
        options["speculation"] = "ngram"
    engine = Engine(model, limits=limits, layers_per_program=block, warmup=False, cache_dir=None, progress=False,
                    kv_cache_bytes=1 << 30, fp8_enabled=args.fp8, max_adapters=int(args.adapters), **options)
    began = time.process_time()
    engine.runner.compile(False)
    seconds = time.process_time() - began
    engine.runner.resume()
    return engine, seconds


def step(engine: Engine, bucket: Any) -> float:
    """Return the milliseconds of a step with all rows in use."""
    runner = engine.runner
    batch = dry_run_batch(bucket, runner.sizes.slots, engine.config.vocab_size, bucket.rows)
    batch.start[:] = CONTEXT // 64 * 64 if bucket.phase == "prefill" else CONTEXT
    batch.length[:] = batch.start + bucket.tokens
    batch.prompt_length[:] = batch.length
    batch.page_table[:] = 1 + np.arange(batch.page_table.size).reshape(batch.page_table.shape) % (
        runner.sizes.num_pages - 1)
    began = time.perf_counter()
    runner.finish(runner.start(bucket, batch, 0))
    return (time.perf_counter() - began) * 1e3


if __name__ == "__main__":
    main()
