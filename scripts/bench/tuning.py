"""Measure what tuned settings gain on five request traces, and what adapting decode settings gains as the load shifts.

    qwen-jax tune bundled
    python scripts/bench/tuning.py traces [--model bundled] [--rounds 7]
    python scripts/bench/tuning.py bandit [--model bundled] [--rounds 3]

traces: two engines of this process, with and without the tuned settings, answer the same requests in alternating order;
medians. Tuning has not seen the seeds of these traces, and every round has its own prompts.

bandit: few long answers and many short answers in turn, on an untuned engine. An engine that adapts, beginning anew in
every round, is compared with every fixed choice of rows and tokens per dispatch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from workload import say  # noqa: E402

from qwen_jax import Engine  # noqa: E402
from qwen_jax.engine.core.engine_core import DISPATCH_SECONDS  # noqa: E402
from qwen_jax.engine.scheduling.decode_adaptation import Choice, DecodeAdaptation  # noqa: E402
from qwen_jax.tuning.tune import SEEDS as TUNED_ON  # noqa: E402
from qwen_jax.tuning.workloads import LOADS, Load, Trace, of_load, trace  # noqa: E402

SEEDS = (101, 102, 103)
assert not set(SEEDS) & set(TUNED_ON)
FEW, MANY = Load(4, (32, 64), (560, 600)), Load(64, (16, 64), (76, 84))
SHIFTS = (FEW, MANY) * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["traces", "bandit"])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    (traces if args.what == "traces" else bandit)(args)


def seconds(engine: Engine, work: Trace, salt: int) -> float:
    """Return the seconds in which the engine answers the trace's requests; `salt` seeds the tokens of their prompts."""
    prompts, params = work.requests(engine.config.vocab_size, salt)
    began = time.perf_counter()
    outputs = engine.generate(prompts, params)
    took = time.perf_counter() - began
    if [len(output.token_ids) for output in outputs] != list(work.answers):
        raise SystemExit("answers have the wrong length")
    return took


def traces(args: argparse.Namespace) -> None:
    """Print the seconds that engines with default and tuned settings take for each request trace, and their ratio."""
    engines = {name: Engine.from_pretrained(args.model, warmup="full", dtype=args.dtype, tokenizer=None, **option)
               for name, option in (("default", {"tuned": None}), ("tuned", {}))}
    if engines["tuned"].tuned is None:
        raise SystemExit("there is no tuned file for this device and model: run qwen-jax tune first")
    print(f"{engines['tuned'].stats().tuned}; seeds {SEEDS}, {args.rounds or 7} rounds")
    longest = engines["default"].limits.max_seq_len
    for engine in engines.values():
        for name in LOADS:
            seconds(engine, trace(name, SEEDS[0], longest), 0)
    print(f"{'trace':10} {'default s':>10} {'tuned s':>10} {'ratio':>7} {'ratios of rounds':>20}")
    for name in LOADS:
        times = {kind: [] for kind in engines}
        for round_ in range(args.rounds or 7):
            for seed in SEEDS:
                work = trace(name, seed, longest)
                for kind in sorted(engines, reverse=(round_ + seed) % 2 == 0):
                    times[kind].append(seconds(engines[kind], work, 1000 * seed + round_))
        by_seed = {kind: [statistics.median(values[index::len(SEEDS)]) for index in range(len(SEEDS))]
                   for kind, values in times.items()}
        totals = {kind: sum(values) for kind, values in by_seed.items()}
        ratios = sorted(a / b for a, b in zip(times["default"], times["tuned"]))
        middle = f"{ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f}"
        print(f"{name:10} {totals['default']:10.2f} {totals['tuned']:10.2f} "
              f"{totals['default'] / totals['tuned']:7.2f} {middle:>20}", flush=True)


class Fixed(DecodeAdaptation):
    """A `DecodeAdaptation` that never adapts: it takes the rows and steps of `fixed`, or the default if smaller."""

    fixed = Choice(1 << 20, 1 << 20)

    def choices(self, decoding: int, single: bool) -> tuple[Choice, ...]:
        default = super().choices(decoding, single)[0]
        return (Choice(min(default.rows, self.fixed.rows), min(default.steps, self.fixed.steps)),)


def bandit(args: argparse.Namespace) -> None:
    """Print an engine's seconds for a shifting load: adapting its rows and steps per dispatch, and with each fixed."""
    engine = Engine.from_pretrained(args.model, warmup="full", dtype=args.dtype, tokenizer=None, tuned=None, adapt=True)
    limits = engine.limits
    policies = {"adapting": None} | {
        f"{choice.rows} x {choice.steps}": choice
        for choice in (Choice(rows, steps) for rows in limits.decode_rows[-3:][::-1]
                       for steps in dict.fromkeys((limits.decode_steps, 1)))}
    times: dict[str, list[float]] = {name: [] for name in policies}
    steps = []
    for round_ in range(-1, args.rounds or 3):  # round -1 warms up
        order = list(policies) if round_ % 2 == 0 else list(policies)[::-1]
        for name in order if round_ >= 0 else order[-1:]:
            kind = Fixed if policies[name] else DecodeAdaptation
            engine.core.adaptation = kind(limits.decode_rows, limits.decode_steps, DISPATCH_SECONDS)
            if policies[name]:
                engine.core.adaptation.fixed = policies[name]
            before = decode_steps(engine)
            took = sum(seconds(engine, of_load(str(index), load, 7 + index, limits.max_seq_len), 100 * round_ + index
                               + 1000) for index, load in enumerate(SHIFTS))
            if round_ >= 0:
                times[name].append(took)
                if name == "adapting":
                    steps.append(decode_steps(engine) - before)
                say(f"round {round_} {name}: {took:.2f} s")
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = medians.pop("adapting")
    best, worst = min(medians, key=medians.get), max(medians, key=medians.get)
    for name, value in medians.items():
        print(f"{name:10} {value:8.2f} s")
    print(f"adapting   {own:8.2f} s, {statistics.median(steps):.0f} decode steps, {len(times['adapting'])} rounds")
    print(f"regret against the best fixed choice ({best}): {100 * (own / medians[best] - 1):.1f} %")
    print(f"against the worst ({worst}): {medians[worst] / own:.2f} x; against the default: "
          f"{next(iter(medians.values())) / own:.2f} x")


def decode_steps(engine: Engine) -> int:
    return sum(usage.steps for bucket, usage in engine.core.counters.usage.items() if bucket.phase == "decode")


if __name__ == "__main__":
    main()
