"""Compare the speed of the distilled student with its teacher: judgements and generated tokens per second.

    python scripts/bench/student.py [TEACHER] [STUDENT] [--rounds 9]

Both run as engines with default settings on the CPU, in one process, and take turns. *classify* judges held-out
transactions, each a prompt that no cache has seen; *generate* continues such prompts greedily, and its time is that of
the tokens after the first. Ratios are the teacher's median time over the student's: above 1, the student is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from workload import exactly, say, seconds  # noqa: E402

from qwen_jax import Engine  # noqa: E402
from qwen_jax.checkpoint import resolve  # noqa: E402
from qwen_jax.evaluation.fraud.task import generate  # noqa: E402
from qwen_jax.evaluation.fraud.text import format_messages  # noqa: E402

LABELS = ("fraud", "legit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", nargs="?", default="bundled")
    parser.add_argument("student", nargs="?", default="student")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--judgements", type=int, default=32, help="judgements of each round")
    parser.add_argument("--rows", default="8,1", help="sequences that generate at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each sequence, after the first")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    names = {"teacher": args.teacher, "student": args.student}
    engines = {name: Engine.from_pretrained(ref, warmup="full", dtype=args.dtype, progress=False)
               for name, ref in names.items()}

    def prompts(round_: int, count: int) -> list[str]:
        return [format_messages(example.messages) for example in generate(1000 + round_, "heldout", count)]

    def classify(engine: Engine, round_: int) -> float:
        payments = prompts(round_, args.judgements)
        return seconds(lambda: engine.classify(payments, LABELS))

    def continuing(rows: int):
        def run(engine: Engine, round_: int) -> float:
            payments = prompts(round_, rows)
            engine.generate(payments, exactly(1))  # the prefix cache has the prompts from here on
            first, all_tokens = (seconds(partial(engine.generate, payments, exactly(count)))
                                 for count in (1, args.tokens + 1))
            return all_tokens - first
        return run

    measures = {"classify": (args.judgements, "judgements/s", classify)}
    for rows in map(int, args.rows.split(",")):
        measures[f"generate, {rows} rows"] = rows * args.tokens, "tokens/s", continuing(rows)
    print(f"{'':18} {'teacher':>10} {'student':>10} {'ratio':>7}   medians of {args.rounds} alternating rounds, "
          f"{args.dtype}")
    for name, (work, unit, run) in measures.items():
        times = {which: [] for which in engines}
        for round_ in range(-1, args.rounds):
            for which in engines if round_ % 2 else reversed(engines):
                took = run(engines[which], round_)
                if round_ >= 0:  # round -1 warms up
                    times[which].append(took)
        teacher, student = (statistics.median(times[which]) for which in ("teacher", "student"))
        say(f"{name}: ratios by round " + " ".join(f"{a / b:.2f}" for a, b in zip(*times.values(), strict=True)))
        print(f"{name:18} {work / teacher:10.1f} {work / student:10.1f} {teacher / student:7.2f}   {unit}", flush=True)
    for which, engine in engines.items():
        folder, stats = resolve(names[which]).path, engine.stats()
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{which}: {names[which]}, {engine.config.num_layers} layers, {engine.config.num_parameters:,} "
              f"parameters, {size / 1e6:.2f} MB; compiles after warm-up: {stats.compiles_after_warmup}")


if __name__ == "__main__":
    main()
