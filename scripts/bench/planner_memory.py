"""The planner's memory for twenty (model, mesh, bucket) triples against XLA's analysis of the engine's programs.

    python scripts/bench/planner_memory.py [--dtype float32]

Released widths with fewer layers, on simulated devices; compiled and not run. Exit code 1 when one is over 10 %
off.
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

CASES = (  # size, layers, tensor, stages, rows, prefill
    Case("0.5b", 24, 1, 1, 16, (4, 512)),
    Case("0.5b", 4, 3, 1, 32, (1, 4096)),
    Case("1.5b", 4, 2, 1, 32, (8, 1024)),
    Case("3b", 4, 4, 1, 16, (1, 2048)),
    Case("7b", 4, 1, 1, 8, (2, 4096)),
    Case("7b", 4, 4, 1, 32, (2, 4096)),
    Case("14b", 4, 5, 1, 32, (8, 1024)),
    Case("14b", 4, 2, 2, 16, (4, 1024)),
    Case("32b", 4, 8, 1, 32, (2, 4096)),
    Case("72b", 4, 8, 1, 32, (2, 4096)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    ratios = []
    for case in CASES:
        for found in compare(case, args.dtype):
            ratios.append(found.ratio)
            print(f"{case.size:>4} x {case.layers} layers, tensor {case.tensor}, stage {found.stage + 1} of "
                  f"{case.stages}, {found.bucket:<32} predicted {found.predicted / 1e6:9,.0f} MB, "
                  f"XLA {found.compiled / 1e6:9,.0f} MB: {found.ratio - 1:+.1%}", flush=True)
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(f"{len(ratios)} programs; largest difference {worst:.1%}")
    return int(worst > 0.1)


if __name__ == "__main__":
    sys.exit(main())
