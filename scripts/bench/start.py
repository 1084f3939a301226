"""Measure how long a user waits: from the start of a process to the first token, with and without compiled programs.

    python scripts/bench/start.py MODEL [--rounds 3] [--skip generate serve compile]

MODEL is a Hugging Face folder or ``bundled``. Prints, in seconds:

- generate: from the start of ``qwen-jax generate`` to the first character of its answer, with an empty cache and with
  all programs on disk, and from the start of a process of transformers that does the same (not for ``bundled``);
- serve: from the start of ``qwen-jax serve`` with an empty cache to the first answered request and to the last program,
  and times between tokens of one stream before and after that;
- compile: CPU seconds to compile the default table (64 rows, 4,096 tokens), by kind of program.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

PROMPT = "def fib(n):"
TRANSFORMERS = """
import sys, torch, transformers
from transformers.generation.streamers import BaseStreamer
class Printer(BaseStreamer):
    seen = 0
    def put(self, tokens):  # the prompt comes first
        self.seen += 1
        if self.seen > 1:
            print(tokenizer.decode(tokens), end="", flush=True)
    def end(self):
        pass
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
model.generate(**inputs, max_new_tokens=16, do_sample=False, streamer=Printer())
"""
COMPILE = """
import json, sys, time
from qwen_jax import Engine
engine = Engine.without_weights(sys.argv[1], cache_dir=None, max_batch_size=64, max_seq_len=4096, progress=False)
steps, cpu, seen = engine.runner.steps, {}, set()
for bucket in engine.runner.table:
    for key in steps.keys(bucket):
        if key not in seen:
            seen.add(key)
            began = time.process_time()
            steps.lower(key).compile()
            kind = getattr(key[0], "kind", "whole step")
            cpu.setdefault(kind, []).append(time.process_time() - began)
print(json.dumps(cpu))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=("generate", "serve", "compile"))
    args = parser.parse_args()
    for measure in (generate, serve, compile_table):
        if measure.__name__.split("_")[0] not in args.skip:
            measure(args.model, args.rounds)


def generate(model: str, rounds: int) -> None:
    """Print the medians of the seconds to the first token: of a cold and a warm start, and of transformers."""
    times: dict[str, list[float]] = {"empty cache": [], "programs on disk": []}
    if model != "bundled":
        times["transformers"] = []
    command = [sys.executable, "-m", "qwen_jax.cli", "generate", model, "--prompt", PROMPT, "--max-tokens", "16",
               "--temperature", "0"]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in times:
                if kind == "transformers":
                    times[kind].append(first_output([sys.executable, "-c", TRANSFORMERS, model, PROMPT], cache))
                else:
                    times[kind].append(first_output(command, cache))
    for kind, seconds in times.items():
        print(f"generate, {kind}: {statistics.median(seconds):.1f} s to the first token "
              f"({', '.join(f'{value:.1f}' for value in seconds)})", flush=True)


def first_output(command: list[str], cache: str) -> float:
    """Return the seconds from the start of a command to its first output, and wait for its end."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "QWEN_JAX_CACHE": cache}, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    first = process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.stdout.read()
    if process.wait() or not first:
        raise SystemExit(f"{' '.join(command[:4])} failed")
    return seconds


def serve(model: str, rounds: int) -> None:
    """Print the seconds to a server's first answer and to its last program, and the times between tokens meanwhile."""
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            began = time.perf_counter()
            server = subprocess.Popen([sys.executable, "-m", "qwen_jax.cli", "serve", model, "--port", str(port)],
                                      env={**os.environ, "QWEN_JAX_CACHE": cache}, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL)
            try:
                while not stream(model, port, 1):
                    if server.poll() is not None or time.perf_counter() - began > 600:
                        raise SystemExit("the server does not answer")
                    time.sleep(0.1)
                first, busy = time.perf_counter() - began, []
                while programs_to_come(port):
                    busy += stream(model, port, 32)[1:]
                whole, quiet = time.perf_counter() - began, []
                for _ in range(max(4, len(busy) // 32)):
                    quiet += stream(model, port, 32)[1:]
            finally:
                server.terminate()
                server.wait()
            ratio = quantile(busy, 0.99) / quantile(quiet, 0.99) if busy else float("nan")
            print(f"serve, empty cache: {first:.1f} s to the first answer, {whole:.1f} s to the last program; ms "
                  f"between tokens, median and 99 %: {describe(busy)} while compiling, {describe(quiet)} after: "
                  f"{ratio:.2f} x", flush=True)


def stream(model: str, port: int, tokens: int) -> list[float]:
    """Return the seconds between the parts of a streamed answer; nothing when there is no server yet."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return []
        times, last = [], time.perf_counter()
        for line in response:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                times.append(now - last)
                last = now
        return times
    except (ConnectionError, http.client.HTTPException):
        return []
    finally:
        connection.close()


def programs_to_come(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/ready")
    return json.loads(connection.getresponse().read())["programs_to_come"]


def compile_table(model: str, rounds: int) -> None:
    """Print the CPU seconds that the programs of the default table take to trace, lower and compile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", COMPILE, model], stdout=subprocess.PIPE, check=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu: dict[str, list[float]] = json.loads(done.stdout)
    total = Counter({kind: sum(seconds) for kind, seconds in cpu.items()})
    print(f"compile: {sum(total.values()):.0f} CPU s for {sum(map(len, cpu.values()))} programs "
          f"({after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f} with the imports): "
          + ", ".join(f"{kind} {seconds:.0f} ({len(cpu[kind])})" for kind, seconds in total.most_common()))


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def describe(values: list[float]) -> str:
    if not values:
        return "none"
    return f"{statistics.median(values) * 1e3:.0f} and {quantile(values, 0.99) * 1e3:.0f}"


if __name__ == "__main__":
    main()
