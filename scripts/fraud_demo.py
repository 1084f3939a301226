"""A day of the anti-fraud service, compressed: traffic, drift, a new adapter, a canary, and what became of it.

    python scripts/fraud_demo.py [--seconds 270] [--rate 60] [--folder runs/fraud_demo]

Requests are sent open loop, two in three of them repetitions. In the afternoon the upstream system's words change. Once
fewer than 94 % of the last judgements were right, an adapter is trained (configs/train/fraud_drift.toml), loaded into
the running server, tried on a fifth and half of the accounts, and promoted. Where that is not done when the day ends,
the next one begins.
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
EXAMPLES = 2000   # of the training
WATCHED = 300     # last new payments, whose judgements tell of a drift
ALARM = 0.94
AFTERWARDS = 30.0  # seconds of traffic after the promotion, at least
BIN = 5.0         # seconds of a point of the picture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=270, help="that the day takes")
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
    import msgspec

    from qwen_jax.evaluation.fraud.replay import Day, day
    from qwen_jax.serving.load_test.raw_client import replay

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
        bodies = [(one.at, msgspec.json.encode(one.screening.request)) for one in arrived]

        def requests():
            yield from bodies
            for one in tomorrow:
                if repairing.done() and story.seconds > story.moments.get("promoted", 0) + AFTERWARDS:
                    return
                arrived.append(replace(one, at=args.seconds + one.at))
                yield arrived[-1].at, msgspec.json.encode(one.screening.request)

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
    failed = sum(one.status != 200 for one in outcomes)
    return int(failed > 0 or "promoted" not in story.moments)


class Server:
    """``qwen-jax serve bundled --fraud`` and its admin port."""

    def __init__(self, work: Path) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.url, self.log, self._key = f"http://127.0.0.1:{self.port}", work / "server.log", secrets.token_hex(16)
        command = [sys.executable, "-m", "qwen_jax.cli", "serve", "bundled", "--fraud", "--port", str(self.port),
                   "--max-seq-len", "256", "--max-batch-size", "32", "--max-adapters", "1", "--max-requests", "4096",
                   "--kv-cache-bytes", str(512 << 20), "--admin-port", str(self.admin_port)]
        environment = {**os.environ, "QWEN_JAX_ADMIN_KEYS": self._key}
        self._process = subprocess.Popen(command, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    async def ready(self) -> None:
        while True:
            if self._process.poll() is not None:
                raise UserError(f"the server has ended: {self.log}")
            try:
                await self.ask("GET", "/ready")
                return
            except OSError:  # not listening, or not ready: urllib's HTTPError is one too
                await asyncio.sleep(0.2)

    async def ask(self, method: str, path: str, body: dict | None = None) -> dict:
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
    """Watches judgements and repairs what drifts. moments: by name, in seconds of the day."""

    def __init__(self, server: Server, work: Path, arrived: list, clock: float) -> None:
        self._server, self._work, self.clock = server, work, clock
        self._truth = {one.at: one for one in arrived if not one.repeats}
        self._right: deque[bool] = deque(maxlen=WATCHED)
        self._drifted = asyncio.Event()
        self.moments: dict[str, float] = {}

    def note(self, outcome) -> None:
        """Of an answer: what is later known of new payments comes in here."""
        arrival = self._truth.get(outcome.due)
        if arrival is None or outcome.status != 200 or self._drifted.is_set():
            return
        self._right.append(outcome.verdict["decision"] == arrival.screening.label)
        if len(self._right) == WATCHED and sum(self._right) < ALARM * WATCHED:
            self._drifted.set()

    async def repair(self) -> None:
        await self._drifted.wait()
        self._now("drift noticed", f"only {sum(self._right)} of the last {WATCHED} new payments were judged rightly")
        adapter = await self._train()
        self._now("trained", f"an adapter is trained: {adapter}")
        await self._server.ask("POST", "/v1/load_lora_adapter", {"lora_name": "words", "lora_path": str(adapter)})
        await self._server.ask("POST", "/admin/canary", {"adapter": "words", "weights": [0.2, 0.5], "requests": 40,
                                                         "shadowed": 0})
        self._now("canary", "it is tried on a fifth of the accounts, then on half")
        while (found := await self._server.ask("GET", "/admin/canary"))["state"] == "running":
            await asyncio.sleep(0.1)
        if found["state"] != "promoted":
            say(f"   it was taken back: {found['why']}")
            return
        self._now("promoted", f"all accounts have it, after {found['requests']} requests of its own")

    async def _train(self) -> Path:
        from qwen_jax.evaluation.fraud.replay import write_training

        data, recipe = self._work / "train.jsonl", self._work / "recipe.toml"
        await asyncio.to_thread(write_training, data, EXAMPLES)
        text = re.sub(r"^data = .*$", f"data = [{json.dumps(str(data))}]", RECIPE.read_text(), flags=re.M)
        text = re.sub(r"^output = .*$", f"output = {json.dumps(str(self._work / 'adapter'))}", text, flags=re.M)
        recipe.write_text(text)
        with (self._work / "train.log").open("w") as log:
            training = await asyncio.create_subprocess_exec(  # after the server, where cores are short
                "nice", "-n", "5", sys.executable, "-m", "qwen_jax.cli", "train", str(recipe), stdout=log, stderr=log)
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
        """Of the day, now."""
        return time.perf_counter() - self.clock

    def _now(self, name: str, text: str) -> None:
        self.moments[name] = self.seconds
        say(f"   {self.moments[name]:5.0f} s  {name}: {text}")


def phases(arrived: list, moments: dict[str, float]) -> list[tuple[str, float, float]]:
    """(name, from, to), in seconds of the day."""
    drift = min((one.at for one in arrived if one.screening.drifted), default=arrived[-1].at)
    cuts = [("before the drift", 0.0), ("new words", drift)]
    cuts += [(name, moments[moment]) for name, moment in (("and training", "drift noticed"), ("canary", "canary"),
                                                          ("after the promotion", "promoted")) if moment in moments]
    ends = [begin for _, begin in cuts[1:]] + [arrived[-1].at + 1]
    return [(name, begin, end) for (name, begin), end in zip(cuts, ends)]


def report(arrived: list, outcomes: list, moments: dict[str, float]) -> None:
    import numpy as np

    print(f"\n{'phase':20} {'seconds':>8} {'requests':>9} {'failed':>7} {'accuracy':>9} {'frauds found':>13} "
          f"{'cached':>7} {'p50, ms':>8} {'p99, ms':>8}")
    pairs = list(zip(arrived, outcomes))
    for name, begin, end in [*phases(arrived, moments), ("the day", 0.0, arrived[-1].at + 1)]:
        mine = [(a, o) for a, o in pairs if begin <= a.at < end]
        if not mine:
            continue
        good = [(a, o, o.verdict["decision"]) for a, o in mine if o.status == 200]
        frauds = [said == "fraud" for a, _, said in good if a.screening.label == "fraud"]
        p50, p99 = 1e3 * np.quantile([o.seconds for _, o in mine], [0.5, 0.99])
        print(f"{name:20} {end - begin:8.0f} {len(mine):9,} {len(mine) - len(good):7} "
              f"{sum(said == a.screening.label for a, _, said in good) / len(mine):9.3f} "
              f"{sum(frauds) / max(len(frauds), 1):13.3f} {sum(o.cached for _, o in mine) / len(mine):7.2f} "
              f"{p50:8.1f} {p99:8.1f}")


def picture(arrived: list, outcomes: list, moments: dict[str, float], path: Path) -> None:
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at = np.array([one.at for one in arrived])
    right = np.array([o.status == 200 and o.verdict["decision"] == a.screening.label
                      for a, o in zip(arrived, outcomes)])
    cached, seconds = np.array([o.cached for o in outcomes]), np.array([o.seconds for o in outcomes])
    bins = (at // BIN).astype(int)
    kept = [b for b in range(bins.max() + 1) if (bins == b).sum() >= 50]
    series = {"right judgements": lambda m: right[m].mean(), "requests per second": lambda m: m.sum() / BIN,
              "from the cache": lambda m: cached[m].mean(), "p99, ms": lambda m: 1e3 * np.quantile(seconds[m], 0.99)}
    figure, axes = plt.subplots(len(series), 1, figsize=(9, 9), sharex=True)
    for axis, (name, value) in zip(axes, series.items()):
        axis.plot([(b + 0.5) * BIN for b in kept], [value(bins == b) for b in kept], color="tab:blue")
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
