"""Compare the speed of two checkouts of this project: decode step, prefill, the engine's own time, and HTTP requests.

    python scripts/bench/checkouts.py BEFORE AFTER [--model bundled] [--rounds 5] [--dtype float32] [--bar 0.98]

Each round starts one process for each checkout, in alternating order, with the compiled programs of a first, uncounted
round on disk. A ratio is the median over the rounds of AFTER's speed over BEFORE's in the same round. Exits with 1
below `--bar`.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROWS, PROMPT, ANSWER, REQUESTS = 8, 512, 128, 300


def measure(model: str, dtype: str) -> dict[str, float]:
    """Return the imported checkout's decode and prefill tokens per second, and its steps per second of host time."""
    import numpy as np

    from qwen_jax import Engine, SamplingParams

    engine = Engine.from_pretrained(model, dtype=dtype, max_batch_size=ROWS, max_seq_len=1024, prefix_cache=False,
                                    warmup=True, progress=False)
    rng = np.random.default_rng(0)

    def run(length: int, tokens: int) -> float:
        prompts = rng.integers(1, engine.config.vocab_size // 2, (ROWS, length)).tolist()
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - began

    run(PROMPT, 8)  # the first steps measure themselves
    prefill = min(run(PROMPT, 1) for _ in range(5))
    before = engine.stats()
    whole = min(run(16, ANSWER) for _ in range(5))
    after = engine.stats()
    steps = sum(bucket.steps for bucket in after.buckets) - sum(bucket.steps for bucket in before.buckets)
    return {"decode tokens": ROWS * ANSWER / whole, "prefill tokens": ROWS * PROMPT / prefill,
            "steps by host time": steps / (after.host_seconds - before.host_seconds)}


def serve(model: str, dtype: str) -> dict[str, float]:
    """Start an HTTP server; return the requests per second of one client that asks for one token at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qwen_jax.cli", "serve", model, "--port", str(port), "--dtype", dtype,
               "--max-batch-size", str(ROWS), "--max-seq-len", "1024", "--response-cache-mb", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env={**os.environ, "QWEN_JAX_WARMUP": "full"})
    try:
        def ask(number: int) -> float:
            body = {"model": model, "prompt": [number % 200 + 1] * 8, "max_tokens": 1, "temperature": 0}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
            began = time.perf_counter()
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
            return time.perf_counter() - began

        end = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the server did not become ready") from None
                time.sleep(0.2)
        return {"HTTP requests": 1 / statistics.median(map(ask, range(REQUESTS)))}
    finally:
        server.terminate()
        server.wait()


def child(checkout: Path, cache: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure the speeds of a checkout in a new process that imports its packages; return them by name."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}",
                   "QWEN_JAX_CACHE": cache, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    found = subprocess.run([sys.executable, __file__, "--child", "--model", args.model, "--dtype", args.dtype],
                           cwd=cache, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", type=Path, nargs="*", metavar="CHECKOUT")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bar", type=float, default=0.98)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({**measure(args.model, args.dtype), **serve(args.model, args.dtype)}))
        return 0
    if len(args.checkouts) != 2:
        parser.error("give two checkouts, the one before and the one after")
    places = [place.resolve() for place in args.checkouts]
    rounds = []
    with tempfile.TemporaryDirectory() as cache:
        caches = [os.path.join(cache, name) for name in ("before", "after")]
        for folder in caches:
            os.mkdir(folder)
        for number in range(args.rounds + 1):
            order = (0, 1) if number % 2 else (1, 0)
            speeds = {index: child(places[index], caches[index], args) for index in order}
            if number:
                rounds.append((speeds[0], speeds[1]))
            print(f"round {number} of {args.rounds}: {speeds}", file=sys.stderr, flush=True)
    met = True
    for name in rounds[0][0]:
        ratios = [after[name] / before[name] for before, after in rounds]
        ratio = statistics.median(ratios)
        met &= ratio >= args.bar
        print(f"{name} a second: {statistics.median(before[name] for before, _ in rounds):.1f} before, "
              f"{statistics.median(after[name] for _, after in rounds):.1f} after, ratio {ratio:.3f} "
              f"({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"bar {args.bar}: {'met' if met else 'missed'}")
    return not met


if __name__ == "__main__":
    sys.exit(main())
