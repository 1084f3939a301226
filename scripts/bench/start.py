"""Measure the time from process start to a ready engine, with an empty executable cache and with a warm cache.

    python scripts/bench/start.py [MODEL or preset] [--rounds 2]

A preset (default: qwen2.5-0.5b) gets random bf16 weights, written once as a Hugging Face folder. Each start is a fresh
process with default engine settings; ``inside`` is the engine alone, without imports and weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import sys
from qwen_jax import Engine
stats = Engine.from_pretrained(sys.argv[1]).stats()
print(stats.warmup_seconds, stats.executables, sum(b.from_disk for b in stats.buckets))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="qwen2.5-0.5b")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model != "bundled" and not Path(model).exists():
            model = make_checkpoint(model, Path(folder) / "hf")
        times = {"cold": [], "warm": []}
        for round_ in range(args.rounds):
            for kind in times:
                times[kind].append(start(model, Path(folder) / f"cache{round_}"))
                print(f"{kind}: {times[kind][-1][0]:.1f} s to ready, {times[kind][-1][1]:.1f} s inside the engine, "
                      f"{times[kind][-1][2]} executables", flush=True)
        cold, warm = (statistics.median(t for t, _, _ in times[kind]) for kind in times)
        print(f"{args.model}: cold {cold:.1f} s, warm {warm:.1f} s, ratio {cold / warm:.1f}")


def start(model: str | Path, cache: Path) -> tuple[float, float, int]:
    """Start an engine in a new process; return seconds until ready, seconds of warm-up, and number of executables."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, str(model)], env={**os.environ, "QWEN_JAX_CACHE": str(cache)},
                          stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    inside, executables, _ = done.stdout.split()
    return seconds, float(inside), int(executables)


def make_checkpoint(preset: str, folder: Path) -> Path:
    """Write a Hugging Face folder with a preset's shape and random bf16 weights, and return the folder."""
    import ml_dtypes
    import numpy as np

    from qwen_jax import ModelConfig
    from qwen_jax.checkpoint import save_hf
    from qwen_jax.model import abstract

    config = ModelConfig.preset(preset)
    noise = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    save_hf({path: np.resize(noise, spec.shape) for path, spec in abstract(config).items()}, config, folder)
    return folder


if __name__ == "__main__":
    main()
