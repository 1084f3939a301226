"""Replay a compressed day of the anti-fraud service: traffic, drift, a new adapter, a canary, and the results.

    python scripts/fraud_demo.py [--seconds 270] [--rate 60] [--folder runs/fraud_demo]

Requests are sent open loop; two in three are repetitions. In the afternoon the upstream system's words change. When
fewer than 94 % of the last judgements are right, the demo trains an adapter (configs/train/fraud_drift.toml), loads
it into the running server, tries it on a fifth and then half of the accounts, and promotes it. If that is not
finished when the day ends, the traffic of the next day follows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from dataclasses import replace
from pathlib import Path

from qwen_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/train/fraud_drift.toml"
EXAMPLES = 2000  # conversations to train on
WATCHED = 300  # new payments in the moving window that detects the drift
ALARM = 0.94  # share of right judgements in the window below which the adapter is trained
AFTERWARDS = 30.0  # minimum seconds of traffic after the promotion
BIN = 5.0  # seconds per point of the picture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=270, help="length of the day")
    parser.add_argument("--rate", type=float, default=60, help="requests per second, on average over the day")
    parser.add_argument("--repeats", type=float, default=0.65, help="share of exact repetitions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/fraud_demo"), help="for the adapter and the picture")
    args = parser.parse_args()
    try:
        import uvloop

        return uvloop.run(run(args))
    except ModuleNotFoundError as error:
        print(f"fraud_demo: the package {error.name} is missing: pip install 'qwen-jax[serve,train]'", file=sys.stderr)
    except UserError as error:
        print(f"fraud_demo: {error}", file=sys.stderr)
    return 2


async def run(args: argparse.Namespace) -> int:
    """Replay the day of payments and repair its drift; return 1 if a request failed or no adapter was promoted."""
    import msgspec

    from qwen_jax.evaluation.fraud.replay import Day, day
    from qwen_jax.serving.load_test.replay import replay

    args.folder.mkdir(parents=True, exist_ok=True)
    work = args.folder / time.strftime("%Y%m%d-%H%M%S")
    work.mkdir()
    today = Day(args.seconds, args.rate, args.repeats, seed=args.seed)
    arrived, tomorrow = day(today), day(replace(today, seed=args.seed + 100, drift_at=0.0))
    say(f"1. a day of {len(arrived):,} requests in {args.seconds:.0f} s, {args.repeats:.0%} of them repetitions")
    server = Server(work)
    try:
        await server.ready()
        say(f"2. the server is ready at {server.url} (log: {server.log})")
        story = Story(server, work, arrived, time.perf_counter())
        repairing = asyncio.create_task(story.repair())
        bodies = [(arrival.at, msgspec.json.encode(arrival.screening.request)) for arrival in arrived]

        def requests():
            yield from bodies
            for arrival in tomorrow:
                if repairing.done() and story.seconds > story.moments.get("promoted", 0) + AFTERWARDS:
                    return
                arrived.append(replace(arrival, at=args.seconds + arrival.at))
                yield arrived[-1].at, msgspec.json.encode(arrival.screening.request)

        outcomes = await replay(server.port, requests(), story.clock, story.note)
        if repairing.done():
            repairing.result()
        else:
            say("   there was no drift to repair, or not enough time for it")
            repairing.cancel()
            await asyncio.gather(repairing, return_exceptions=True)
    finally:
        server.stop()
    report(arrived, outcomes, story.moments)
    picture(arrived, outcomes, story.moments, args.folder / "day.png")
    say(f"picture: {args.folder / 'day.png'}")
    failed = sum(outcome.status != 200 for outcome in outcomes)
    return int(failed > 0 or "promoted" not in story.moments)


class Server:
    """A running ``qwen-jax serve bundled --fraud`` with an admin port."""

    def __init__(self, work: Path) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.url, self.log, self._key = f"http://127.0.0.1:{self.port}", work / "server.log", secrets.token_hex(16)
        command = [sys.executable, "-m", "qwen_jax.cli", "serve", "bundled", "--fraud", "--port", str(self.port),
                   "--max-seq-len", "256", "--max-batch-size", "32", "--max-adapters", "1", "--max-requests", "4096",
                   "--kv-cache-bytes", str(512 << 20), "--admin-port", str(self.admin_port),
                   "--adapter-dir", str(work)]
        environment = {**os.environ, "QWEN_JAX_ADMIN_KEYS": self._key}
        self._process = subprocess.Popen(command, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    async def ready(self) -> None:
        """Wait until the server is ready; raise `UserError` if it ends."""
        while True:
            if self._process.poll() is not None:
                raise UserError(f"the server has ended: {self.log}")
            try:
                await self.ask("GET", "/ready")
                return
            except OSError:  # not listening yet, or not ready: urllib's HTTPError is an OSError
                await asyncio.sleep(0.2)

    async def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """Send a request to the server or, for a path below /admin, to its admin port; return the JSON answer."""
        port = self.admin_port if path.startswith("/admin") else self.port
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode() if body else None,
                                         headers, method=method)

        def send() -> bytes:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()

        return json.loads(await asyncio.to_thread(send) or b"{}")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Story:
    """The operator of the demo: watches how many judgements are right; trains and rolls out an adapter after drift.

    Attributes:
      clock: `time.perf_counter` at the beginning of the day.
      moments: second of the day at which "drift noticed", "trained", "canary" and "promoted" happened.
    """

    def __init__(self, server: Server, work: Path, arrived: list, clock: float) -> None:
        self._server, self._work, self.clock = server, work, clock
        self._truth = {arrival.at: arrival for arrival in arrived if not arrival.repeats}
        self._right: deque[bool] = deque(maxlen=WATCHED)
        self._drifted = asyncio.Event()
        self.moments: dict[str, float] = {}

    def note(self, outcome) -> None:
        """Record whether the answer to a new payment was right; repetitions and failures do not count."""
        arrival = self._truth.get(outcome.due)
        if arrival is None or outcome.status != 200 or self._drifted.is_set():
            return
        self._right.append(outcome.verdict["decision"] == arrival.screening.label)
        if len(self._right) == WATCHED and sum(self._right) < ALARM * WATCHED:
            self._drifted.set()

    async def repair(self) -> None:
        """Wait until judgements get worse; then train an adapter, load it, try it as a canary, await its promotion."""
        await self._drifted.wait()
        self._now("drift noticed", f"only {sum(self._right)} of the last {WATCHED} new payments were judged rightly")
        adapter = await self._train()
        self._now("trained", f"an adapter is trained: {adapter}")
        await self._server.ask("POST", "/v1/load_lora_adapter", {"lora_name": "words", "lora_path": str(adapter)})
        await self._server.ask("POST", "/admin/canary", {"adapter": "words", "weights": [0.2, 0.5], "requests": 40,
                                                         "shadowed": 0})
        self._now("canary", "it is tried on a fifth of the accounts, then on half")
        while (trial := await self._server.ask("GET", "/admin/canary"))["state"] == "running":
            await asyncio.sleep(0.1)
        if trial["state"] != "promoted":
            say(f"   it was taken back: {trial['why']}")
            return
        self._now("promoted", f"all accounts have it, after {trial['requests']} requests of its own")

    async def _train(self) -> Path:
        from qwen_jax.evaluation.fraud.replay import write_training

        data, recipe = self._work / "train.jsonl", self._work / "recipe.toml"
        await asyncio.to_thread(write_training, data, EXAMPLES)
        text = re.sub(r"^data = .*$", f"data = [{json.dumps(str(data))}]", RECIPE.read_text(), flags=re.M)
        text = re.sub(r"^output = .*$", f"output = {json.dumps(str(self._work / 'adapter'))}", text, flags=re.M)
        recipe.write_text(text)
        with (self._work / "train.log").open("w") as log:
            # nice: the server goes first where cores are scarce.
            command = ["nice", "-n", "5", sys.executable, "-m", "qwen_jax.cli", "train", str(recipe)]
            training = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
            try:
                code = await training.wait()
            except asyncio.CancelledError:
                training.terminate()
                raise
        if code:
            raise UserError(f"the training failed: {self._work / 'train.log'}")
        return self._work / "adapter/result"

    @property
    def seconds(self) -> float:
        """Seconds since the beginning of the day."""
        return time.perf_counter() - self.clock

    def _now(self, name: str, text: str) -> None:
        self.moments[name] = self.seconds
        say(f"   {self.moments[name]:5.0f} s  {name}: {text}")


def phases(arrived: list, moments: dict[str, float]) -> list[tuple[str, float, float]]:
    """Split the day at the drift and the adapter's `moments`; return (name, begin, end) of each phase, in seconds."""
    drift = min((arrival.at for arrival in arrived if arrival.screening.drifted), default=arrived[-1].at)
    cuts = [("before the drift", 0.0), ("new words", drift)]
    cuts += [(name, moments[moment]) for name, moment in (("and training", "drift noticed"), ("canary", "canary"),
                                                          ("after the promotion", "promoted")) if moment in moments]
    ends = [begin for _, begin in cuts[1:]] + [arrived[-1].at + 1]
    return [(name, begin, end) for (name, begin), end in zip(cuts, ends)]


def report(arrived: list, outcomes: list, moments: dict[str, float]) -> None:
    """Print requests, failures, accuracy, cache hits and latencies of every phase and of the whole day."""
    import numpy as np

    print(f"\n{'phase':20} {'seconds':>8} {'requests':>9} {'failed':>7} {'accuracy':>9} {'frauds found':>13} "
          f"{'cached':>7} {'p50, ms':>8} {'p99, ms':>8}")
    pairs = list(zip(arrived, outcomes))
    for name, begin, end in [*phases(arrived, moments), ("the day", 0.0, arrived[-1].at + 1)]:
        phase = [(a, o) for a, o in pairs if begin <= a.at < end]
        if not phase:
            continue
        good = [(a, o.verdict["decision"]) for a, o in phase if o.status == 200]
        frauds = [decision == "fraud" for a, decision in good if a.screening.label == "fraud"]
        p50, p99 = 1e3 * np.quantile([o.seconds for _, o in phase], [0.5, 0.99])
        print(f"{name:20} {end - begin:8.0f} {len(phase):9,} {len(phase) - len(good):7} "
              f"{sum(decision == a.screening.label for a, decision in good) / len(phase):9.3f} "
              f"{sum(frauds) / max(len(frauds), 1):13.3f} {sum(o.cached for _, o in phase) / len(phase):7.2f} "
              f"{p50:8.1f} {p99:8.1f}")


def picture(arrived: list, outcomes: list, moments: dict[str, float], path: Path) -> None:
    """Draw accuracy, request rate, cache hits and p99 latency over the day, as an image file."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at = np.array([arrival.at for arrival in arrived])
    right = np.array([o.status == 200 and o.verdict["decision"] == a.screening.label
                      for a, o in zip(arrived, outcomes)])
    cached, seconds = np.array([o.cached for o in outcomes]), np.array([o.seconds for o in outcomes])
    bins = (at // BIN).astype(int)
    full = [b for b in range(bins.max() + 1) if (bins == b).sum() >= 50]
    series = {"right judgements": lambda m: right[m].mean(), "requests per second": lambda m: m.sum() / BIN,
              "from the cache": lambda m: cached[m].mean(), "p99, ms": lambda m: 1e3 * np.quantile(seconds[m], 0.99)}
    figure, axes = plt.subplots(len(series), 1, figsize=(9, 9), sharex=True)
    for axis, (name, value) in zip(axes, series.items()):
        axis.plot([(b + 0.5) * BIN for b in full], [value(bins == b) for b in full], color="tab:blue")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        for _, begin, _ in phases(arrived, moments)[1:]:
            axis.axvline(begin, color="tab:red", linestyle=":", linewidth=1)
    axes[0].set_ylim(0.7, 1.02)
    axes[0].axhline(0.95, color="gray", linewidth=0.8)
    for name, begin, _ in phases(arrived, moments)[1:]:
        axes[0].text(begin, 1.03, name, rotation=20, fontsize=8, color="tab:red")
    axes[-1].set_xlabel("seconds of the compressed day")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
