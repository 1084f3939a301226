"""Measure the time to the first token under load, through `AsyncEngine`: 0.5B shape, random weights, bf16.

    python scripts/bench/latency.py ttft [--requests 100] [--interval 6] [--long 8192]
    python scripts/bench/latency.py poisson [--minutes 5] [--load 0.8]

Times count from the moment a request was due, not from when it was accepted; percentiles are of all requests.

ttft: long prompts are prefilled all the time, and prompts of 32 tokens arrive at random. Bar: the 99th percentile of
their time to the first token is at most 3 times the duration of a prefill chunk, which is the mean step, during the
run, of the largest prefill bucket that ran.

poisson: CLIENTS clients, each with one open request, first work through the mixed trace of `throughput.py`; the
capacity is their rate from the CLIENTS-th answer until the last request is submitted. Then requests of the same kind
arrive at random at LOAD times the capacity for MINUTES. Bars: no request is lost, and the 99th percentile of the time
to the first token is at most 4 times the 50th.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
from workload import Request, say, shape, token_ids, trace  # noqa: E402

from qwen_jax import AsyncEngine, Engine  # noqa: E402
from qwen_jax.model import init  # noqa: E402

TTFT_BAR, POISSON_BAR = 3.0, 4.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ttft = commands.add_parser("ttft", help="short prompts beside long ones")
    ttft.add_argument("--requests", type=int, default=100, help="short prompts")
    ttft.add_argument("--interval", type=float, default=6.0, help="mean seconds between short prompts")
    ttft.add_argument("--long", type=int, default=8192, help="tokens of a long prompt")
    ttft.add_argument("--short", type=int, default=32, help="tokens of a short prompt")
    ttft.add_argument("--background", type=int, default=2, help="long prompts under way at any time")
    ttft.add_argument("--answer", type=int, default=8, help="tokens generated for a short prompt")
    ttft.set_defaults(run=short_beside_long)
    poisson = commands.add_parser("poisson", help="random arrivals at a share of the capacity")
    poisson.add_argument("--minutes", type=float, default=5.0)
    poisson.add_argument("--load", type=float, default=0.8)
    poisson.add_argument("--clients", type=int, default=32)
    poisson.add_argument("--capacity-requests", type=int, default=160, help="requests that measure the capacity")
    poisson.add_argument("--longest", type=int, nargs=2, default=(1024, 128), metavar=("PROMPT", "ANSWER"))
    poisson.set_defaults(run=random_arrivals)
    for command in (ttft, poisson):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--preset", default="qwen2.5-0.5b")
        command.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    args = parser.parse_args()
    if args.command == "poisson" and args.capacity_requests <= 2 * args.clients:
        poisson.error("--capacity-requests must be more than twice --clients")
    longest = args.long + args.answer if args.command == "ttft" else sum(args.longest)
    model = init(shape(args.preset, args.layers), args.seed, "bfloat16")
    return asyncio.run(serve(Engine(model, warmup="full", max_seq_len=longest), args))


async def serve(engine: Engine, args) -> int:
    """Run the measurement that the command line names on an `AsyncEngine` of `engine`; return the exit code."""
    served = AsyncEngine(engine)
    try:
        return await args.run(served, engine.config.vocab_size, args)
    finally:
        await served.close()


# --- short prompts beside long ones

async def short_beside_long(engine: AsyncEngine, vocab: int, args) -> int:
    """Measure the time to the first token of short prompts beside long prompts; return 1 if the bar is missed."""
    rng = np.random.default_rng(args.seed)
    finished = itertools.count(1)

    async def keep_busy() -> None:
        while True:
            took = await first_token(engine, Request(token_ids(rng, args.long, vocab), 1), time.perf_counter())
            say(f"long prompt {next(finished)}: first token after {took:.1f} s")

    background = [asyncio.create_task(keep_busy()) for _ in range(args.background)]
    before = prefills(await engine.stats())
    due = np.cumsum(rng.exponential(args.interval, args.requests))
    requests = [Request(token_ids(rng, args.short, vocab), args.answer) for _ in due]
    times = await arrivals(engine, requests, due)
    after = prefills(await engine.stats())
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)

    ran = [name for name in after if after[name][0] > before[name][0]]
    largest = max(ran, key=lambda name: (math.prod(after[name][2]), after[name][2][1]))
    steps, spent = (new - old for new, old in zip(after[largest][:2], before[largest][:2]))
    print(f"one chunk ({largest}): {spent / steps:.3f} s, the mean of {steps} steps; {next(finished) - 1} long prompts")
    return verdict(times, spent / steps, "one chunk", TTFT_BAR)


def prefills(stats) -> dict[str, tuple[int, float, tuple[int, ...]]]:
    """Return (steps so far, their seconds, (rows, tokens)) by the name of each prefill bucket (batch shape)."""
    return {bucket.bucket: (bucket.steps, bucket.seconds, tuple(map(int, bucket.bucket.split()[-1].split("x"))))
            for bucket in stats.buckets if bucket.bucket.startswith("prefill/")}


# --- random arrivals

async def random_arrivals(engine: AsyncEngine, vocab: int, args) -> int:
    """Measure the time to the first token with random arrivals below the capacity; return 1 if a bar is missed."""
    ranges = (min(16, args.longest[0]), args.longest[0]), (1, args.longest[1])
    capacity = await closed_loop(engine, trace(args.capacity_requests, args.seed, 0, *ranges), args.clients)
    rate = args.load * capacity
    print(f"capacity: {capacity:.3f} requests/s with {args.clients} clients; offered: {rate:.3f} requests/s for "
          f"{args.minutes:g} minutes", flush=True)
    rng = np.random.default_rng((args.seed, 2))
    due = np.cumsum(rng.exponential(1 / rate, int(3 * rate * args.minutes * 60) + 10))
    due = due[due < args.minutes * 60]
    waiting = []

    async def sample() -> None:
        while True:
            waiting.append((await engine.stats()).waiting)
            await asyncio.sleep(0.25)

    sampler = asyncio.create_task(sample())
    began = time.perf_counter()
    times = await arrivals(engine, trace(len(due), args.seed + 1, 1, *ranges), due)
    took = time.perf_counter() - began
    sampler.cancel()
    print(f"{len(due)} requests, the last finished after {took:.0f} s; longest queue {max(waiting)}, "
          f"mean {statistics.mean(waiting):.1f}")
    return verdict(times, None, "p50", POISSON_BAR)


async def closed_loop(engine: AsyncEngine, requests: list[Request], clients: int) -> float:
    """Return the requests per second that the engine answers while every client has one open request."""
    queue, ends = iter(requests), []

    async def client() -> None:
        for request in queue:
            if math.isinf(await first_token(engine, request, time.perf_counter())):
                raise SystemExit("a request was lost while the capacity was measured")
            ends.append(time.perf_counter())
            say(f"capacity: {len(ends)} of {len(requests)}")

    await asyncio.gather(*(client() for _ in range(clients)))
    first, last = clients - 1, len(ends) - clients  # when request `last` ends, the queue is empty
    return (last - first) / (ends[last] - ends[first])


# --- both

async def arrivals(engine: AsyncEngine, requests: list[Request], due: np.ndarray) -> list[float]:
    """Submit each request at its `due` second; return the seconds from then to its first token, inf if it is lost."""
    began = time.perf_counter()

    async def arrive(request: Request, moment: float) -> float:
        await asyncio.sleep(began + moment - time.perf_counter())
        took = await first_token(engine, request, began + moment)
        say(f"{moment:.1f} s: {len(request.prompt)} tokens, the first after {took:.2f} s")
        return took

    return list(await asyncio.gather(*(arrive(request, moment) for request, moment in zip(requests, due.tolist()))))


async def first_token(engine: AsyncEngine, request: Request, due: float) -> float:
    """Run a request to its end; return the seconds from ``due`` to the first token, inf if any token is missing."""
    first, tokens = math.inf, 0
    try:
        async for delta in engine.stream(request.prompt, request.params):
            if delta.token_ids and not tokens:
                first = time.perf_counter() - due
            tokens += len(delta.token_ids)
    except Exception as error:
        say(f"lost: {type(error).__name__}: {error}")
    return first if tokens == request.tokens else math.inf


def verdict(times: list[float], unit: float | None, name: str, bar: float) -> int:
    """Print percentiles of the times to the first token; return 1 if one is infinite or p99 is over the bar.

    The bar is ``bar`` times ``unit`` seconds (default: p50); ``name`` says what the unit is.
    """
    p50, p99 = np.percentile(times, [50, 99], method="higher")
    unit, lost = unit or p50, sum(map(math.isinf, times))
    print(f"time to the first token of {len(times)} requests: p50 {p50:.3f} s, p99 {p99:.3f} s; lost: {lost}\n"
          f"p99 / {name}: {p99 / unit:.2f}, bar {bar:g}")
    return int(lost > 0 or p99 / unit > bar)


if __name__ == "__main__":
    sys.exit(main())
