"""Load balancing policies on a skewed trace, in the simulator: how long requests take, and how even the load is.

    python scripts/bench/balance.py [--replicas 8,200] [--seconds 120] [--rate 3] [--seeds 8] [--picture FILE.png]
                                    [--measure bundled]

Equal replicas; up to 50 of them also with a quarter at half speed. Every policy gets the same traces (`skewed_trace`),
one for each seed; more than 50 replicas get three at most. Columns are means over seeds. In flight: requests queued or
running, averaged over time; busy: share of the time with a step in progress. Then throughput with more requests than
the replicas can answer, against one replica with the same trace at its share of the rate. How long a replica takes is
given by options; the defaults are assumptions, not measurements. With --measure an engine runs steps of many sizes here
first, and a line through their times takes the options' place; rates are then such that replicas are as busy as with
the defaults. Takes minutes, most of them for 200 replicas.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import numpy as np
from workload import say

from qwen_jax.cluster.routing.policies import RoundRobin, choose, least_loaded, random_choice, two_choices
from qwen_jax.cluster.simulation.simulator import Result, ServiceTimes, imbalance, simulate
from qwen_jax.cluster.simulation.traces import skewed_trace

OURS, MOVES = "ours", ", moves"
MANY = 50  # replicas: above, a simulation takes ten seconds
POLICIES = {  # what makes a policy, and whether queues are evened out
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
    parser.add_argument("--seconds", type=float, default=120, help="of arrivals")
    parser.add_argument("--rate", type=float, default=3, help="requests per second and replica")
    parser.add_argument("--saturating-rate", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--report-seconds", type=float, default=0.1)
    parser.add_argument("--rebalance-seconds", type=float, default=1.0)
    parser.add_argument("--prefill-tokens-per-second", type=float, default=5000)
    parser.add_argument("--step-ms", type=float, default=4, help="a step's base")
    parser.add_argument("--row-ms", type=float, default=0.2, help="a row's decode step")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--picture", metavar="FILE.png")
    parser.add_argument("--measure", metavar="MODEL", help="whose steps are timed on this machine")
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
    """A line through the times of an engine's steps: least squares, weighted so that relative errors count."""
    from qwen_jax import Engine, SamplingParams

    engine = Engine.from_pretrained(model, max_batch_size=max_batch, max_seq_len=2048, prefix_cache=False)
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
    """Seconds of a mean request of the trace, a quarter of the batch beside it."""
    trace = skewed_trace(2000, 1.0, 0)
    prompt, answer = (np.mean([getattr(one, name) for one in trace]) for name in ("prompt_tokens", "output_tokens"))
    steps = prompt / times.chunk_tokens + answer / (times.max_batch / 4)
    return float(steps * times.base + prompt * times.per_prefill_token + answer * times.per_decode_row)


def slower(times: ServiceTimes) -> ServiceTimes:
    return dataclasses.replace(times, base=2 * times.base, per_prefill_token=2 * times.per_prefill_token,
                               per_decode_row=2 * times.per_decode_row)


def seeds(count: int, args) -> range:
    return range(args.seeds if count <= MANY else min(args.seeds, 3))


def run(policy: str, replicas: list[ServiceTimes], rate: float, seed: int, args) -> Result:
    """rate: requests per second and replica."""
    make, moves = POLICIES[policy]
    total = rate * len(replicas)
    return simulate(skewed_trace(int(total * args.seconds), total, seed), replicas, make(), seed=seed,
                    report_seconds=args.report_seconds, rebalance_seconds=args.rebalance_seconds if moves else None)


def compare(title: str, replicas: list[ServiceTimes], args) -> dict[str, list[Result]]:
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
    """Per second, of requests that ended while others still arrived."""
    cells = []
    for some in (replicas[:1], replicas):
        all_of_it = [run(OURS, some, args.saturating_rate, seed, args) for seed in seeds(len(replicas), args)]
        cells.append([np.mean([value(result) for result in all_of_it]) for value in (
            lambda result: result.requests_per_second, lambda result: result.tokens_per_second,
            lambda result: result.utilisation.mean())])
    (one, one_tokens, one_busy), (many, many_tokens, many_busy) = cells
    print(f"\n{len(replicas)} replicas, {args.saturating_rate:g} requests/s each: {many:.1f} requests/s and "
          f"{many_tokens:.0f} tokens/s, busy {many_busy:.3f}; one: {one:.2f}, {one_tokens:.0f} and {one_busy:.3f}. "
          f"{many / one:.2f} x the requests, {many_tokens / one_tokens:.2f} x the tokens", flush=True)


def draw(drawn: dict[int, dict[str, list[Result]]], args) -> None:
    """A row for each number of replicas: latency, evenness, and the load of each replica of the first seed."""
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
