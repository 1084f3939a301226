"""Compare answers of every parallel plan that fits eight devices with those of one device, for every released size.

A plan is a number of data, pipeline and tensor parallel parts. Models have the heads of the released size and smaller
widths, so that the script runs on a CPU with simulated devices. It prints a JSON line for each combination and a
summary; the exit code is 1 when a log-probability differs by more than 1e-4, or a token does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "engine"))

from parallel_bench import (  # noqa: E402
    GREEDY,
    SIZES,
    answers_of_one_device,
    engine_of,
    largest_difference,
    prompts,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    args = parser.parse_args()
    worst, wrong, count = 0.0, 0, 0
    for size in args.sizes:
        for data in (1, 2):
            for stages in (1, 2, 4):
                for tensor in range(1, 8 // (data * stages) + 1):
                    engine = engine_of(size, tp_size=tensor, pp_size=stages, dp_size=data, cache_dir=None)
                    difference = largest_difference(engine.generate(prompts(), GREEDY), answers_of_one_device(size))
                    row = {"size": size, "data": data, "stages": stages, "tensor": tensor,
                           "layout": str(engine.plan.layout), "max_difference": difference,
                           "compiles_after_warmup": engine.stats().compiles_after_warmup}
                    print(json.dumps(row), flush=True)
                    worst, count = max(worst, difference), count + 1
                    wrong += difference > 1e-4 or row["compiles_after_warmup"] > 0
    print(json.dumps({"combinations": count, "wrong": wrong, "max_difference": worst}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
