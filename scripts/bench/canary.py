"""Simulate canary trials of new model versions: how soon a worse one is taken back, and how often an equal one is.

    python scripts/bench/canary.py [--runs 200]
"""

from __future__ import annotations

import argparse
import statistics
import sys

from tqdm import tqdm

from qwen_jax.cluster.canary.policy import TAKEN_BACK
from qwen_jax.cluster.simulation.canary import Version, simulate

CASES = {"the same (A/A)": Version(), "accuracy 10 points lower": Version(disagreed=0.1),
         "5 points lower": Version(disagreed=0.05), "latencies x 3": Version(slower=3.0),
         "latencies x 1.5": Version(slower=1.5), "1 in 10 fails": Version(failed=0.1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    print(f"{'version':26} {'taken back':>10}   after requests of its own: median, p99, most")
    for name, version in CASES.items():
        trials = [simulate(version, seed) for seed in tqdm(range(args.runs), name, file=sys.stderr, leave=False)]
        taken = sorted(trial.total for trial in trials if trial.state == TAKEN_BACK)
        after = f"{statistics.median(taken):.0f}, {taken[int(.99 * len(taken))]}, {taken[-1]}" if taken else "-"
        print(f"{name:26} {len(taken):6} of {args.runs}   {after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
