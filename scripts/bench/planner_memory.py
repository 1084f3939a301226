"""Compare the memory that the planner predicts for twenty programs of the engine with XLA's analysis of them.

    python scripts/bench/planner_memory.py [--dtype float32]

A program belongs to a model, a mesh of devices and a bucket (batch shape). The models have released widths and fewer
layers, on simulated devices; programs are compiled and not run. The exit code is 1 when a prediction is off by more
than 10 %.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "parallel"))

from memory_bench import Case, compare  # noqa: E402

CASES = (
    Case("0.5b", layers=24, tensor=1, stages=1, rows=16, prefill=(4, 512)),
    Case("0.5b", layers=4, tensor=3, stages=1, rows=32, prefill=(1, 4096)),
    Case("1.5b", layers=4, tensor=2, stages=1, rows=32, prefill=(8, 1024)),
    Case("3b", layers=4, tensor=4, stages=1, rows=16, prefill=(1, 2048)),
    Case("7b", layers=4, tensor=1, stages=1, rows=8, prefill=(2, 4096)),
    Case("7b", layers=4, tensor=4, stages=1, rows=32, prefill=(2, 4096)),
    Case("14b", layers=4, tensor=5, stages=1, rows=32, prefill=(8, 1024)),
    Case("14b", layers=4, tensor=2, stages=2, rows=16, prefill=(4, 1024)),
    Case("32b", layers=4, tensor=8, stages=1, rows=32, prefill=(2, 4096)),
    Case("72b", layers=4, tensor=8, stages=1, rows=32, prefill=(2, 4096)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    ratios = []
    for case in CASES:
        for program in compare(case, args.dtype):
            ratios.append(program.ratio)
            print(f"{case.size:>4} x {case.layers} layers, tensor {case.tensor}, stage {program.stage + 1} of "
                  f"{case.stages}, {program.bucket:<32} predicted {program.predicted / 1e6:9,.0f} MB, "
                  f"XLA {program.compiled / 1e6:9,.0f} MB: {program.ratio - 1:+.1%}", flush=True)
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(f"{len(ratios)} programs; largest difference {worst:.1%}")
    return int(worst > 0.1)


if __name__ == "__main__":
    sys.exit(main())
