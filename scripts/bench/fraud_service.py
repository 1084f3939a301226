"""Load the anti-fraud service open loop; print the highest rate that it holds, latencies, and how busy its engine is.

    python scripts/bench/fraud_service.py [--rates 100,200,400] [--cache-mb 64] [--seconds 10] [--payments 4]
                                          [--model student]

A rate is held when 99 % of the answers come within 200 ms of their request's due time and no request fails. Requests
arrive by a Poisson process; 65 % repeat an earlier request letter by letter; the rest are new payments, of accounts
that make ``--payments`` payments on average. At the beginning of each rate all accounts are new; latencies of the first
``--warm`` seconds are not counted. Client, server and engine share this machine's cores. Busy: the share of the wall
time in which the engine's process is in a step. Run the same rates with --cache-mb 0 for the figures without the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

HELD_SECONDS = 0.2
COLUMNS = ("offered/s", "served/s", "p50, ms", "p99, ms", "worst, ms", "failed", "hits", "accuracy", "busy",
           "prefill steps", "with 5 to 32 rows", "rows, mean", "client late p99, ms", "cores: client", "cores: HTTP",
           "cores: engine")


def worker() -> None:
    """Run the engine's process, and write how many prefill steps had 1, 2, ... rows (requests) to $ROWS_OF_STEPS."""
    from qwen_jax.atomic import replace_file
    from qwen_jax.engine.core.counters import Counters
    from qwen_jax.serving.engine_process.process import main as run

    rows, record = Counter(), Counters.record

    def counted(self, plan, *arguments) -> None:
        record(self, plan, *arguments)
        if plan.bucket.phase == "prefill":
            rows[len(plan.rows)] += 1

    def write_rows() -> None:
        path = Path(os.environ["ROWS_OF_STEPS"])
        while True:
            time.sleep(0.2)
            replace_file(path, json.dumps(dict(rows)).encode())

    Counters.record = counted
    threading.Thread(target=write_rows, daemon=True).start()
    run()


def figures(server, rows: Path) -> tuple[float, Counter]:
    """Return the seconds that the server's engine spent in steps, and a histogram of requests per prefill step.

    rows: file to which the engine's process writes the histogram.
    """
    time.sleep(0.5)
    text = server.http.get("/metrics").text
    seconds = sum(float(re.search(rf"^qwen_jax_device_{kind}_seconds_total (\S+)", text, re.M)[1])
                  for kind in ("busy", "idle"))
    return seconds, Counter({int(count): steps for count, steps in json.loads(rows.read_text()).items()})


def cpu_seconds(server) -> np.ndarray:
    """Return the CPU seconds that this process, the HTTP process and the engine's process have used."""
    import psutil

    http = psutil.Process(server.process.pid)
    return np.array([sum(process.cpu_times()[:2]) for process in (psutil.Process(), http, http.children()[0])])


def measure(server, rate: float, args: argparse.Namespace, rows: Path) -> dict[str, float]:
    """Replay payments at `rate` requests per second against the server; return rates, latencies and load by column."""
    import msgspec
    import uvloop

    from qwen_jax.evaluation.fraud.replay import Day, arrivals_at
    from qwen_jax.serving.load_test.replay import replay
    from qwen_jax.serving.load_test.workload import Load, arrivals

    seed = args.seed + int(rate)
    lasting = args.seconds + args.warm
    options = Day(lasting, rate, args.repeats, args.payments, drift_at=1.0, seed=seed)
    arrived = arrivals_at(options, arrivals(Load(seconds=lasting, seed=seed), rate).tolist())
    bodies = [(arrival.at, msgspec.json.encode(arrival.screening.request)) for arrival in arrived]
    busy, steps = figures(server, rows)
    used, began = cpu_seconds(server), time.perf_counter()
    outcomes = uvloop.run(replay(server.port, bodies))
    wall = time.perf_counter() - began
    cores = (cpu_seconds(server) - used) / wall
    later, more = figures(server, rows)
    more.subtract(steps)
    pairs = list(zip(outcomes, arrived))
    seconds = np.array([outcome.seconds for outcome, arrival in pairs if arrival.at >= args.warm])
    good = [(outcome, arrival) for outcome, arrival in pairs if outcome.status == 200]
    right = sum(outcome.verdict["decision"] == arrival.screening.label for outcome, arrival in good)
    within = sum(count for size, count in more.items() if 5 <= size <= 32)
    return dict(zip(COLUMNS, (
        rate, len(good) / wall, 1e3 * np.median(seconds), 1e3 * np.quantile(seconds, 0.99), 1e3 * seconds.max(),
        len(outcomes) - len(good), sum(outcome.cached for outcome in outcomes) / len(outcomes), right / len(outcomes),
        (later - busy) / wall, more.total(), within / max(more.total(), 1),
        sum(size * count for size, count in more.items()) / max(more.total(), 1),
        1e3 * np.quantile([outcome.sent - outcome.due for outcome in outcomes], 0.99), *cores)))


def main() -> int:
    tests = Path(__file__).resolve().parents[2] / "tests"
    sys.path[:0] = [str(tests), str(tests / "serving")]
    from live import Live

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="50,100,200,400,800")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warm", type=float, default=3, metavar="SECONDS", help="left out of each rate")
    parser.add_argument("--model", default="bundled", help="bundled or student")
    parser.add_argument("--cache-mb", default="64", help="0 for no cache")
    parser.add_argument("--repeats", type=float, default=0.65, help="share of requests that repeat an earlier request")
    parser.add_argument("--payments", type=float, default=4, help="payments of an account, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", default="", help="further options of qwen-jax serve")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        os.environ["ROWS_OF_STEPS"] = str(rows)
        options = ["--fraud", "--max-seq-len", "256", "--max-batch-size", "32", "--max-adapters", "1",
                   "--kv-cache-bytes", str(512 << 20), "--max-requests", "4096", "--response-cache-mb", args.cache_mb,
                   *args.server.split()]
        server = Live(*options, model=args.model, worker=str(Path(__file__).resolve()), quick=False)
        try:
            measured = [measure(server, float(rate), args, rows) for rate in ["20", *args.rates.split(",")]][1:]
        finally:
            server.output()
    width = max(map(len, COLUMNS))
    for name in COLUMNS:
        cells = (f"{row[name]:10.3f}" if 0 < row[name] < 10 else f"{row[name]:10,.0f}" for row in measured)
        print(f"{name:{width}} {' '.join(cells)}")
    held = [row["served/s"] for row in measured if row["p99, ms"] < 1e3 * HELD_SECONDS and not row["failed"]]
    print(f"held: {max(held, default=0):,.0f} requests/s with p99 < 200 ms")
    return 0


if __name__ == "__main__":
    sys.exit(worker() if len(sys.argv) == 2 and sys.argv[1].isdigit() else main())
