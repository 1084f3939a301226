"""Compare load-balancing policies in a simulator, on skewed traces of requests: latency, and how even the load is.

    python scripts/bench/balance.py [--replicas 8,200] [--seconds 120] [--rate 3] [--seeds 8] [--picture FILE.png]
                                    [--measure bundled]

The replicas are equal; up to 50 replicas are also simulated with a quarter of them at half speed. Every policy gets the
same traces (`skewed_trace`), one trace per seed; more than 50 replicas get three seeds at most. Columns are means over
seeds. In flight: requests queued or running, averaged over time; busy: share of the time with a step in progress. The
last lines give the throughput with more requests than the replicas can answer, against a single replica with the same
trace at its share of the rate. The options set a replica's service times; the defaults are assumptions, not
measurements. With --measure an engine runs steps of many sizes on this machine first, and a line through their times
replaces the options; the rates are then scaled so that replicas are as busy as with the defaults. The script takes
minutes, most of them for 200 replicas.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import numpy as np
from workload import say

from qwen_jax.cluster.routing.policies import choose
from qwen_jax.cluster.simulation.policies import RoundRobin, least_loaded, random_choice, two_choices
from qwen_jax.cluster.simulation.simulator import Result, ServiceTimes, imbalance, simulate
from qwen_jax.cluster.simulation.traces import skewed_trace

OURS, MOVES = "ours", ", moves"
MANY = 50  # replicas above which a simulation takes ten seconds or more
POLICIES = {  # name: (factory of the policy, whether `rebalance_load` evens out the queues)
    "random": (lambda: random_choice, False),
    "round robin": (RoundRobin, False),
    "round robin" + MOVES: (RoundRobin, True),
    "two choices": (lambda: two_choices, False),
    "fewest requests": (lambda: least_loaded, False),
    OURS + ", no moves": (lambda: choose, False),
    OURS: (lambda: choose, True),
}
DRAWN = [name for name in POLICIES if MOVES not in name and "no moves" not in name]
COLUMNS = {
    "p50 s": lambda result: np.percentile(result.latency, 50),
    "p99 s": lambda result: np.percentile(result.latency, 99),
    "first token p99 s": lambda result: np.percentile(result.first_token, 99),
    "in flight": lambda result: result.in_flight.mean(),
    "max/mean": lambda result: imbalance(result.in_flight),
    "busy": lambda result: result.utilisation.mean(),
    "busy max/mean": lambda result: imbalance(result.busy),
    "cached": lambda result: result.cached_share,
    "moved": lambda result: result.moved,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", default="8,200")
    parser.add_argument("--seconds", type=float, default=120, help="length of the trace")
    parser.add_argument("--rate", type=float, default=3, help="requests per second and replica")
    parser.add_argument("--saturating-rate", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--report-seconds", type=float, default=0.1)
    parser.add_argument("--rebalance-seconds", type=float, default=1.0)
    parser.add_argument("--prefill-tokens-per-second", type=float, default=5000)
    parser.add_argument("--step-ms", type=float, default=4, help="fixed cost of a step")
    parser.add_argument("--row-ms", type=float, default=0.2, help="cost of one row in a decode step")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--picture", metavar="FILE.png")
    parser.add_argument("--measure", metavar="MODEL", help="model whose steps are timed on this machine")
    args = parser.parse_args()
    times = ServiceTimes(args.step_ms / 1e3, 1 / args.prefill_tokens_per_second, args.row_ms / 1e3, args.max_batch)
    if args.measure:
        assumed, times = times, measured(args.measure, args.max_batch)
        faster = work_of_a_request(assumed) / work_of_a_request(times)
        args.rate, args.saturating_rate = args.rate * faster, args.saturating_rate * faster
        args.seconds, args.report_seconds = args.seconds / faster, args.report_seconds / faster
        args.rebalance_seconds /= faster
    drawn = {}
    for count in map(int, args.replicas.split(",")):
        equal, quarter = [times] * count, count // 4
        drawn[count] = compare(f"{count} equal replicas", equal, args)
        if quarter and count <= MANY:
            compare(f"{count} replicas, {quarter} of them at half speed",
                    [slower(times)] * quarter + equal[quarter:], args)
        throughput(equal, args)
    if args.picture:
        draw(drawn, args)


def measured(model: str, max_batch: int) -> ServiceTimes:
    """Time an engine's steps on this machine and fit `ServiceTimes` to them by least squares of relative errors."""
    from qwen_jax import Engine, SamplingParams

    engine = Engine.from_pretrained(model, warmup="full", max_batch_size=max_batch, max_seq_len=2048,
                                    prefix_cache=False)
    rng, vocabulary = np.random.default_rng(0), engine.input_processor.vocab_limit
    points = []  # prompt tokens, rows that decode, seconds
    for rows in (1, 2, 4, 8, 16, 32):
        for length in (16, 64, 256, 1024):
            prompts = [rng.integers(1, vocabulary, length).tolist() for _ in range(min(rows, 8192 // length))]
            for answer in (1, 33):
                params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
                engine.generate(prompts, params)
                samples = []
                for _ in range(5):
                    began = time.perf_counter()
                    engine.generate(prompts, params)
                    samples.append(time.perf_counter() - began)
                points.append((len(prompts) * length, len(prompts), answer, np.median(samples)))
        say(f"measured {rows} rows")
    prompts_of = {point[:2]: point[3] for point in points if point[2] == 1}
    # A call with one token of answer is its prefill; 32 more tokens are 32 decode steps.
    columns, seconds = [], []
    for tokens, rows, answer, taken in points:
        steps = -(-tokens // ServiceTimes.chunk_tokens)
        if answer == 1:
            columns.append((steps, tokens, 0))
            seconds.append(taken)
        else:
            columns.append((1, 0, rows))
            seconds.append(max(taken - prompts_of[tokens, rows], 1e-6) / (answer - 1))
    weights = 1 / np.array(seconds)
    fitted, *_ = np.linalg.lstsq(np.array(columns) * weights[:, None], np.ones(len(seconds)), rcond=None)
    base, token, row = np.maximum(fitted, 0)
    error = np.median(np.abs(np.array(columns) @ fitted * weights - 1))
    print(f"{model} on this machine: a step takes {base * 1e3:.2f} ms, {1 / token:,.0f} prompt tokens per second, "
          f"{row * 1e3:.3f} ms per row that decodes; half of the steps are within {error:.0%} of that", flush=True)
    return ServiceTimes(base, token, row, max_batch)


def work_of_a_request(times: ServiceTimes) -> float:
    """Return the seconds that the mean request of `skewed_trace` takes in a batch that is a quarter full."""
    trace = skewed_trace(2000, 1.0, 0)
    prompt = np.mean([request.prompt_tokens for request in trace])
    answer = np.mean([request.output_tokens for request in trace])
    steps = prompt / times.chunk_tokens + answer / (times.max_batch / 4)
    return float(steps * times.base + prompt * times.per_prefill_token + answer * times.per_decode_row)


def slower(times: ServiceTimes) -> ServiceTimes:
    """Return the service times of a replica at half the speed of one with `times`."""
    return dataclasses.replace(times, base=2 * times.base, per_prefill_token=2 * times.per_prefill_token,
                               per_decode_row=2 * times.per_decode_row)


def seeds(count: int, args) -> range:
    """Return the seeds of the traces for `count` replicas: at most three above `MANY` replicas, which take long."""
    return range(args.seeds if count <= MANY else min(args.seeds, 3))


def run(policy: str, replicas: list[ServiceTimes], rate: float, seed: int, args) -> Result:
    """Simulate one load-balancing policy on the trace of `seed`, with `rate` requests per second for each replica."""
    make, moves = POLICIES[policy]
    total = rate * len(replicas)
    return simulate(skewed_trace(int(total * args.seconds), total, seed), replicas, make(), seed=seed,
                    report_seconds=args.report_seconds, rebalance_seconds=args.rebalance_seconds if moves else None)


def compare(title: str, replicas: list[ServiceTimes], args) -> dict[str, list[Result]]:
    """Simulate every policy with every seed, print a row of latencies and loads per policy, and return all results."""
    results = {}
    print(f"\n{title}, {args.rate:g} requests/s each for {args.seconds:g} s, {len(seeds(len(replicas), args))} seed(s)")
    print(f"{'':>22}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in COLUMNS) + "   max/mean of seeds")
    for policy in POLICIES:
        began = time.perf_counter()
        results[policy] = [run(policy, replicas, args.rate, seed, args) for seed in seeds(len(replicas), args)]
        uneven = [imbalance(result.in_flight) for result in results[policy]]
        cells = "".join(f"{np.mean([value(result) for result in results[policy]]):>{max(9, len(name) + 2)}.2f}"
                        for name, value in COLUMNS.items())
        print(f"{policy:>22}{cells}   {min(uneven):.2f} to {max(uneven):.2f}", flush=True)
        say(f"{title}, {policy}: {time.perf_counter() - began:.0f} s")
    return results


def throughput(replicas: list[ServiceTimes], args) -> None:
    """Print requests and tokens per second under saturation, for all replicas and for one of them.

    Requests that end after the last arrival do not count.
    """
    cells = []
    for group in (replicas[:1], replicas):
        results = [run(OURS, group, args.saturating_rate, seed, args) for seed in seeds(len(replicas), args)]
        cells.append([np.mean([value(result) for result in results]) for value in (
            lambda result: result.requests_per_second, lambda result: result.tokens_per_second,
            lambda result: result.utilisation.mean())])
    (single, single_tokens, single_busy), (many, many_tokens, many_busy) = cells
    print(f"\n{len(replicas)} replicas, {args.saturating_rate:g} requests/s each: {many:.1f} requests/s and "
          f"{many_tokens:.0f} tokens/s, busy {many_busy:.3f}; one: {single:.2f}, {single_tokens:.0f} and "
          f"{single_busy:.3f}. {many / single:.2f} x the requests, {many_tokens / single_tokens:.2f} x the tokens",
          flush=True)


def draw(drawn: dict[int, dict[str, list[Result]]], args) -> None:
    """Draw a row of panels per number of replicas: p99 latency and max / mean load by policy, load of each replica."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(drawn), 4, figsize=(13, 3.1 * len(drawn)), squeeze=False, layout="constrained",
                                width_ratios=[1, 1, 1.2, 1.2])
    for axes, (count, results) in zip(rows, drawn.items()):
        colours = ["tab:blue" if policy == OURS else "silver" for policy in DRAWN]
        for panel, column, title in ((axes[0], "p99 s", "p99 latency (s)"),
                                     (axes[1], "max/mean", "requests in flight, max / mean")):
            values = [np.mean([COLUMNS[column](result) for result in results[policy]]) for policy in DRAWN]
            panel.bar_label(panel.barh(DRAWN, values, color=colours), fmt="%.2f", padding=2, fontsize=9)
            panel.invert_yaxis()
            panel.set_title(title, fontsize=10)
            panel.set_xlim(0, 1.18 * max(values))
            panel.spines[["top", "right"]].set_visible(False)
        axes[1].set_yticklabels([])
        axes[1].axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes[0].set_ylabel(f"{count} replicas", fontsize=11)
        axes[3].sharey(axes[2])
        for panel, policy, colour in ((axes[2], "round robin", "silver"), (axes[3], OURS, "tab:blue")):
            load = results[policy][0].in_flight
            panel.bar(range(count), np.sort(load)[::-1], color=colour, width=0.8 if count < 50 else 1.0)
            panel.axhline(load.mean(), color="black", linewidth=0.8, linestyle="--")
            panel.set_title(f"in flight on each replica, {policy}", fontsize=10)
            panel.set_xticks([])
            panel.set_xlabel("replicas, most loaded first; dashed: mean", fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"simulated, equal replicas, skewed trace of {args.rate:g} requests/s each for {args.seconds:g} s")
    figure.savefig(args.picture, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
