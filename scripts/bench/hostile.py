"""Send a server thousands of hostile requests beside normal streams; check that it does not end, fail, stall or grow.

    python scripts/bench/hostile.py [--minutes 10] [--requests 2000] [--seed 0] [--kinds NAME ...]

The kinds are those of tests/hostile/. First the normal streams run alone; then hostile requests come beside them, kind
after kind, until the minutes have passed and the requests were sent. The time between tokens is that between two pieces
of a stream, of streams which run from beginning to end in one of the two periods. Memory is the resident memory of the
server's two processes, a median of some seconds before the hostile requests and in a quiet period after them. Hostile
requests come from a process of their own, so that making them delays no stream's reader. Exits with 1 when the server
has ended, or failed, or a normal answer has changed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "serving"), str(TESTS / "hostile")]

from hostile_client import Outcome, attack, normal_answer  # noqa: E402
from hostile_requests import KINDS  # noqa: E402
from live import Live  # noqa: E402
from served import PAGE_BYTES, model_with_tools  # noqa: E402

STREAMS = 8
STREAM_TOKENS = 200
QUIET_SHARE, SETTLE_SECONDS = 0.15, 15  # of the time for the quiet period; of looking at the memory
PROMPTS = tuple(f"amount {number} card limit user {number % 7}" for number in range(STREAMS))


class Streams:
    """Normal streams that run one after another, always `STREAMS` at once.

    Attributes:
      gaps: seconds between pieces, by the period in which they arrived.
      texts: the texts of each stream's answers, which are all the same if no request disturbs another.
      seen: number of HTTP statuses by period.
    """

    def __init__(self, url: str) -> None:
        self._url, self.period = url, "warm-up"
        self.gaps: dict[str, list[float]] = defaultdict(list)
        self.texts: list[Counter] = [Counter() for _ in PROMPTS]
        self.seen: Counter = Counter()

    async def run(self) -> None:
        """Run the streams until this is cancelled."""
        async with aiohttp.ClientSession(self._url, connector=aiohttp.TCPConnector(limit=0)) as http:
            await asyncio.gather(*(self._run(http, place) for place in range(STREAMS)))

    async def _run(self, http: aiohttp.ClientSession, place: int) -> None:
        body = {"model": "bundled", "prompt": PROMPTS[place], "max_tokens": STREAM_TOKENS, "temperature": 0,
                "ignore_eos": True, "stream": True}
        while True:
            async with http.post("/v1/completions", json=body) as answer:
                self.seen[self.period, answer.status] += 1
                if answer.status == 200:
                    self.texts[place][await self._read(answer)] += 1
                else:
                    await asyncio.sleep(float(answer.headers.get("Retry-After", 1)))

    async def _read(self, answer: aiohttp.ClientResponse) -> str:
        """Return the text of a stream; note the times between its pieces if it has run within one period."""
        period, text, gaps, last = self.period, "", [], None
        async for line in answer.content:
            if line.startswith(b"data: {"):
                now = time.monotonic()
                text += json.loads(line[6:])["choices"][0]["text"]
                gaps += [] if last is None else [now - last]
                last = now
        if self.period == period:
            self.gaps[period] += gaps
        return text

    def p99(self, period: str) -> float:
        """Return the 99th percentile of the seconds between pieces in a period."""
        return float(np.percentile(self.gaps[period] or [float("nan")], 99))


def batch(name: str, seed: str, port: int) -> tuple[list[Outcome], str, float]:
    """Send requests of a kind at the same time; return the outcomes, and text and seconds of a normal answer after."""
    async def run() -> tuple[list[Outcome], str, float]:
        return await attack(KINDS[name], KINDS[name].at_once, seed, port), *await normal_answer(port)

    return asyncio.run(run())


async def send_hostile(port: int, args: argparse.Namespace, bar: tqdm, normal: Counter,
                       memory: Callable[[], int]) -> tuple[dict[str, list[Outcome]], Counter]:
    """Send hostile requests, kind after kind in random order, until time and number are reached.

    Returns the outcomes, and the bytes by which the server's memory grew beside each kind.

    normal: is told the texts of normal answers between them, and under "seconds" the longest time.
    """
    grown, last = Counter(), memory()
    rng, outcomes, end = random.Random(args.seed), defaultdict(list), time.monotonic() + 60 * args.minutes
    sent, order, loop = 0, [], asyncio.get_running_loop()
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    while time.monotonic() < end or sent < args.requests:
        order = order or rng.sample(args.kinds, len(args.kinds))
        name = order.pop()
        try:
            found, text, seconds = await loop.run_in_executor(pool, batch, name, f"{args.seed} {sent} {name}", port)
        except (OSError, AssertionError) as error:
            bar.write(f"no normal answer after {name}: {error!r}")
            normal["no answer"] += 1
            break
        normal[text] += 1
        normal["seconds"] = max(normal["seconds"], seconds)
        outcomes[name] += found
        now = memory()
        grown[name] += now - last
        last = now
        sent += len(found)
        for problem in {outcome.problem for outcome in found if outcome.problem}:
            bar.write(f"{name}: {problem[:200]}")
        bar.update(len(found))
    pool.shutdown()
    return outcomes, grown


async def settled(memory: Callable[[], int]) -> float:
    """Return the median memory of some seconds, in which the normal streams go on: buffers of steps come and go."""
    seen = []
    for _ in range(2 * SETTLE_SECONDS):
        await asyncio.sleep(0.5)
        seen.append(memory())
    return float(np.median(seen))


async def run(server: Live, args: argparse.Namespace) -> int:
    """Run the quiet period and the attack; print the figures; return the exit code."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]

    def memory() -> int:
        return sum(process.memory_info().rss for process in processes if process.is_running())

    normal = Counter([(await normal_answer(server.port))[0]])
    streams = Streams(server.url)
    running = asyncio.create_task(streams.run())
    await asyncio.sleep(5)
    streams.period = "quiet"
    await asyncio.sleep(max(10, 60 * args.minutes * QUIET_SHARE))
    before = await settled(memory)
    streams.period, began = "hostile", time.monotonic()
    with tqdm(total=args.requests, unit="request", desc="hostile", file=sys.stderr) as bar:
        outcomes, grown = await send_hostile(server.port, args, bar, normal, memory)
    seconds, streams.period = time.monotonic() - began, "after"
    ended = server.process.poll() is not None
    after = memory() if ended else await settled(memory)
    running.cancel()
    ended = ended or server.process.poll() is not None
    slowest, changed = normal.pop("seconds", 0), len(normal) > 1
    report(outcomes, grown, streams, seconds)
    print(f"resident memory {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after: {after / before - 1:+.1%}")
    failed = sum(outcome.problem is not None for found in outcomes.values() for outcome in found)
    different = sum(len(texts) > 1 for texts in streams.texts)
    print(f"exits: {int(ended)}, answers with a problem: {failed}, streams whose text has changed: {different}, normal "
          f"answers between the hostile requests: {'changed' if changed else 'the same'}, slowest {slowest:.2f} s")
    return int(ended or changed or failed > 0 or different > 0)


def report(outcomes: dict[str, list[Outcome]], grown: Counter, streams: Streams, seconds: float) -> None:
    """Print what came of the requests by kind, and the times between tokens of the normal streams."""
    print(f"{sum(map(len, outcomes.values())):,} hostile requests in {seconds / 60:.1f} minutes")
    for name, found in sorted(outcomes.items()):
        statuses = Counter("none" if outcome.status is None else str(outcome.status) for outcome in found)
        worst = sum(outcome.status is not None and outcome.status >= 500 for outcome in found)
        print(f"  {name:15} {len(found):6,}  5xx: {worst}  slowest {max(o.seconds for o in found):6.2f} s  "
              f"{grown[name] / 1e6:+7.1f} MB  "
              + ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items())))
    quiet, hostile = streams.p99("quiet"), streams.p99("hostile")
    for period in ("quiet", "hostile", "after"):
        statuses = {status: number for (when, status), number in sorted(streams.seen.items()) if when == period}
        gaps = streams.gaps[period] or [float("nan")]
        print(f"normal streams, {period}: {statuses}, between tokens p50 {1000 * np.median(gaps):.1f} ms, "
              f"p99 {1000 * streams.p99(period):.1f} ms, longest {1000 * max(gaps):.0f} ms")
    print(f"p99 beside hostile requests is {hostile / quiet:.2f} times that of the quiet period")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of the attack, at least (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="to send, at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        model = model_with_tools(Path(root) / "model")
        options = ["--max-seq-len", "1024", "--max-batch-size", "16", "--max-requests", "64", "--dtype", "float32",
                   "--kv-cache-bytes", str(64 * PAGE_BYTES), "--max-adapters", "2", "--public-adapters",
                   "--adapter-dir", root, "--served-model-name", "bundled", "--response-cache-mb", "0"]
        server = Live(*options, model=str(model), quick=False)
        try:
            while server.http.get("/ready").json()["programs_to_come"]:  # they would disturb the quiet period
                time.sleep(1)
            return asyncio.run(run(server, args))
        finally:
            for line in server.output().splitlines():
                if "Traceback" in line or " ERROR " in line:
                    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
