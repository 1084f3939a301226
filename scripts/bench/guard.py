"""Measure the cost of the numeric guard: decode steps of an 8-bit engine with the guard and of an engine without it.

    python scripts/bench/guard.py [--layers 4] [--rows 8] [--prompt 512] [--rounds 5]

The guard checks in every step that 8 bits can hold the values stored in them and that results are finite.

0.5B shape with fewer layers, random weights, bf16, e4m3 weights and pages. Rounds alternate; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from sparse_engine import decode_usage  # noqa: E402
from workload import exactly, say, shape, token_ids  # noqa: E402

from qwen_jax import Engine  # noqa: E402
from qwen_jax.engine.scheduling.buckets import Limits  # noqa: E402
from qwen_jax.model import init  # noqa: E402


class NoGuard:
    """A stand-in for the engine's numeric `Guard`, with its methods, that checks nothing."""

    def __init__(self, known) -> None:
        self.trips = jnp.zeros(len(known), jnp.int32)

    def check_storable(self, layer, written, offset) -> None:
        pass

    def check_finite(self, layer, x, offset=0) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = init(shape("qwen2.5-0.5b", args.layers), 0, "bfloat16")
    limits = Limits(max_batch_size=args.rows, max_seq_len=args.prompt + 64, prefill_shapes=((1, 512),),
                    recompute_shapes=(), decode_rows=(args.rows,))
    options = {"fp8_enabled": True, "limits": limits, "cache_dir": None, "progress": False}
    engines = {"guarded": Engine(model, warmup="full", **options)}
    with (mock.patch("qwen_jax.engine.compiled.forward.Guard", NoGuard),
          mock.patch("qwen_jax.engine.compiled.forward.damaged_weights", lambda model: 0)):
        engines["not guarded"] = Engine(model, warmup="full", **options)
    say("engines ready")
    times = {name: [] for name in engines}
    rng = np.random.default_rng(0)
    for _ in range(args.rounds):
        prompts = [token_ids(rng, args.prompt) for _ in range(args.rows)]
        for name, engine in engines.items():
            before = decode_usage(engine)
            engine.generate(prompts, exactly(32))
            after = decode_usage(engine)
            times[name].append((after[1] - before[1]) / (after[0] - before[0]))
            say(f"{name}: {1e3 * times[name][-1]:.1f} ms a step")
    guarded, plain = (statistics.median(times[name]) for name in engines)
    print(f"{args.layers} layers, {args.rows} rows: guarded {1e3 * guarded:.1f} ms, not guarded {1e3 * plain:.1f} ms: "
          f"{guarded / plain - 1:+.1%}; trips {engines['guarded'].stats().guard_trips}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
