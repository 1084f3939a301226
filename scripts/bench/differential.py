"""Answer random requests one at a time, and all at once on engines of every kind; compare the answers.

    python scripts/bench/differential.py [--requests 2000] [--seed 0] [--kinds "n-gram,sparse"]

The requests are of every sort (`tests/engine/random_requests.py`): greedy and sampled, with penalties, stop strings,
grammars, several answers, scores, embeddings, adapters, priorities; clients leave in mid-answer. The engines batch
them, cut prompts into chunks, preempt, guess tokens, share prefixes, attend sparsely, and compute in 8 bits
(`tests/engine/differential_kinds.py`); all of them in float32 otherwise. A difference is another token, text, finish
reason or error, or a log-probability beyond the tolerance; answers whose candidates were tied within rounding are
counted apart. Exits with 1 when an answer differs, something is left behind (pages, sequences, compilations), or a
kind did not do what it stands for.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "engine")]

from quick_xla import EIGHT_DEVICES, QUICK  # noqa: E402
from tqdm import tqdm  # noqa: E402

SHOWN = 5  # differences of each kind that are printed; the number of all of them is in the table


def row(cells: list[object]) -> str:
    """Return a row of a table in Markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="names with commas between them; by default all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"{QUICK} {EIGHT_DEVICES}", QWEN_JAX_WARMUP="full",
                          QWEN_JAX_CACHE=folder)
        return compare(args, Path(folder) / "adapters")


def compare(args: argparse.Namespace, adapters: Path) -> int:
    """Compare the kinds of engines that `args` names, and print the table; return 1 if anything is wrong."""
    import differential_kinds as kinds  # after the environment is set: it imports JAX

    kinds.always_guess()
    names = args.kinds.split(",") if args.kinds else [kind.name for kind in kinds.KINDS]
    chosen = [kind for kind in kinds.KINDS if kind.name in names]
    if len(chosen) != len(names):
        print(f"--kinds must be some of {', '.join(kind.name for kind in kinds.KINDS)}, not {args.kinds}")
        return 2
    results, began = [], time.monotonic()
    count = -(-args.requests // len(chosen))
    with tqdm(total=2 * count * len(chosen), unit="runs", file=sys.stderr) as bar:
        for kind in chosen:
            bar.set_description(kind.name)
            results.append(kinds.check(kind, adapters, count, args.seed, on_end=bar.update))
            for problem in [*results[-1].problems[:SHOWN], *(f"tie: {tie}" for tie in results[-1].comparison.ties)]:
                bar.write(f"{kind.name}: {problem}", file=sys.stdout)
    columns = list(results[0].columns)
    print(row(columns), row(["---"] * len(columns)), *(row(list(result.columns.values())) for result in results),
          sep="\n")
    sorts: Counter[str] = sum((result.sorts for result in results), Counter())
    print("requests with", ", ".join(f"{name} {number}" for name, number in sorts.most_common()))
    wrong = sum(len(result.problems) for result in results)
    print(f"{count * len(chosen)} requests in {time.monotonic() - began:.0f} s, seed {args.seed}: {wrong} problems")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
