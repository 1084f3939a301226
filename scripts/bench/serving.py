"""Measure the cost of HTTP: a server whose engine does nothing, or the bundled model served and in-process.

    python scripts/bench/serving.py [--seconds 10] [--streams 200]
    python scripts/bench/serving.py --overhead [--rounds 5]
    python scripts/bench/serving.py --restart [--rounds 5]

By default: requests per second without streaming, and tokens per second over many streams at once, with a stub engine.
With --overhead: tokens per second of 64 streams against `Engine.generate` of the same prompts; rounds alternate,
medians. With --restart: seconds from a start after SIGKILL until the server is ready. Clients, server and engines share
this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "serving")]

from live import HERE, Live  # noqa: E402

CHAT = "/v1/chat/completions"


def request(path: str, **body) -> bytes:
    """Return the bytes of an HTTP/1.1 POST request with a JSON body."""
    content = json.dumps({"model": "bundled", **body}).encode()
    head = (f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n")
    return head.encode() + content


async def requests_of_connection(port: int, message: bytes, end: float) -> int:
    """Send the HTTP request `message` over one connection again and again until the time `end`; count the answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    while time.perf_counter() < end:
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        count += 1
    writer.close()
    return count


async def tokens_of_stream(port: int, message: bytes) -> int:
    """Send a request, read its streamed answer to the end, and count the stub engine's token, "word ", in it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(message)
    count, tail = 0, b""
    while b"0\r\n\r\n" not in tail:  # the last chunk
        data = await reader.read(1 << 16)
        assert data, "the connection was closed"
        count += data.count(b"word ")
        tail = (tail + data)[-16:]
    writer.close()
    return count


async def measure(port: int, args: argparse.Namespace) -> tuple[float, float]:
    """Load the server at `port`; return requests per second of 32 connections, and tokens per second of all streams."""
    messages = [{"role": "user", "content": "hello"}]
    whole = request(CHAT, messages=messages, max_tokens=16)
    began = time.perf_counter()
    counts = await asyncio.gather(*(requests_of_connection(port, whole, began + args.seconds) for _ in range(32)))
    rate = sum(counts) / (time.perf_counter() - began)
    stream = request(CHAT, messages=messages, max_tokens=args.tokens, stream=True)
    began = time.perf_counter()
    counts = await asyncio.gather(*(tokens_of_stream(port, stream) for _ in range(args.streams)))
    return rate, sum(counts) / (time.perf_counter() - began)


def overhead(args: argparse.Namespace) -> int:
    """Print the tokens per second of the bundled model for 64 prompts at once: in-process, and streamed over HTTP."""
    from qwen_jax import Engine, SamplingParams

    count, tokens = 64, 128
    prompts = [f"transaction {number}" for number in range(count)]
    server = Live("--max-seq-len", "256", "--max-batch-size", str(count), quick=False)
    engine = Engine.from_pretrained("bundled", warmup="full", max_seq_len=256, max_batch_size=count)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    messages = [request("/v1/completions", prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True,
                        stream=True) for prompt in prompts]

    async def streams() -> None:
        await asyncio.gather(*(tokens_of_stream(server.port, message) for message in messages))

    rates: dict[str, list[float]] = {"in-process": [], "served": []}
    try:
        for _ in range(args.rounds):
            for name, run in (("in-process", lambda: engine.generate(prompts, params)),
                              ("served", lambda: asyncio.run(streams()))):
                began = time.perf_counter()
                run()
                rates[name].append(count * tokens / (time.perf_counter() - began))
                print(f"{name}: {rates[name][-1]:,.0f} tokens/s", file=sys.stderr)
    finally:
        server.output()
    plain, served = (statistics.median(rates[name]) for name in rates)
    print(f"{count} streams: {plain:,.0f} tokens/s in-process, {served:,.0f} served: {served / plain - 1:+.1%}")
    return 0


def restart(rounds: int) -> int:
    """Print the seconds that a server takes to be ready again after SIGKILL: bundled model, executables on the disk."""
    seconds = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        server = Live(quick=False)
        if number:  # the first may have compiled
            seconds.append(time.perf_counter() - began)
        server.process.kill()
        server.output()
    print(f"ready after SIGKILL in {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=500, help="tokens of each stream")
    parser.add_argument("--overhead", action="store_true", help="the bundled model, served and in-process")
    parser.add_argument("--restart", action="store_true", help="from SIGKILL to ready again")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.restart:
        return restart(args.rounds)
    if args.overhead:
        return overhead(args)
    server = Live(worker=str(HERE / "stub_worker.py"))
    try:
        rate, tokens = asyncio.run(measure(server.port, args))
    finally:
        server.output()
    print(f"{rate:,.0f} requests/s; {tokens:,.0f} streamed tokens/s over {args.streams} streams")
    return 0


if __name__ == "__main__":
    sys.exit(main())
