"""Compare the temporary memory of a prefill in micro-batches (recompute) with prefills in one piece, by XLA's analysis.

    python scripts/bench/recompute.py [--preset qwen2.5-0.5b] [--dtype bfloat16]

A recompute bucket is a prefill whose rows (prompts) run in micro-batches inside one program, which bounds the memory of
activations. 0.5B shape. Nothing is run and no weight is allocated.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from qwen_jax import ModelConfig  # noqa: E402
from qwen_jax.engine.compiled.state import Models, new_state
from qwen_jax.engine.compiled.steps import run_bucket
from qwen_jax.engine.runner.padded_batch import dry_run_batch  # noqa: E402
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import FULL, RECOMPUTE
from qwen_jax.model import Qwen2  # noqa: E402

ROWS, PAGES = 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen2.5-0.5b")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), dtype=args.dtype)))
    leaves, tree = jax.tree.flatten(params)
    state = jax.eval_shape(lambda: new_state(config, ROWS * PAGES + 1, ROWS, args.dtype))

    def temporary(bucket: Bucket) -> float:
        """Return the temporary memory, in MB, of the program compiled for a bucket (a batch shape)."""
        def step(leaves, state, batch, vocab_limit):
            models = Models(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), vocab_limit)
            return run_bucket(models, bucket, state, batch)

        batch = dry_run_batch(bucket, ROWS, config.vocab_size)
        lowered = jax.jit(step, donate_argnums=1).lower(leaves, state, batch, np.int32(1))
        return lowered.compile().memory_analysis().temp_size_in_bytes / 1e6

    buckets = [Bucket("prefill", FULL, 32, 64, PAGES), Bucket("prefill", RECOMPUTE, ROWS, 64, PAGES, micro_rows=32),
               Bucket("prefill", FULL, ROWS, 64, PAGES)]
    sizes = []
    for bucket in buckets:
        sizes.append(temporary(bucket))
        print(f"{str(bucket):34} micro-batches of {bucket.micro_rows:3} rows: {sizes[-1]:8.0f} MB, "
              f"{sizes[-1] / sizes[0]:.2f} x", flush=True)


if __name__ == "__main__":
    main()
