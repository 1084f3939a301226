"""Run a server under mixed random traffic for a long time; check that it does not grow, leak pages, compile or fail.

    python scripts/bench/soak.py [--minutes 20] [--clients 12]

The traffic is completions and chats, streamed and not, of random lengths and options, with schemas, tools, several
answers, scores, classifications, embeddings and adapters. In a tenth of the requests the client leaves before the end,
a twentieth is invalid; adapters are loaded and unloaded, weights updated and rolled back all the time. Memory is the
resident memory of both processes: after the first tenth of the time, and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import psutil
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "serving")]

from live import Live, free_port  # noqa: E402
from random_adapter import save_random_adapter  # noqa: E402
from served import PAGE_BYTES, model_with_tools  # noqa: E402

KEY = "soak"
BAD = ({"temperature": -1}, {"max_tokens": 0}, {"prompt": ""}, {"model": "unknown"}, {"guided_regex": "(("},
       {"prompt": [10**7]}, {"n": 0}, {"colour": 1}, {"prompt": "x " * 3000}, {"logprobs": 99})
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"where": {"enum": ["here", "there"]}}, "required": ["where"]}}}


def random_request(rng: random.Random) -> tuple[str, dict]:
    """Return the path and the body of a valid request of a random kind."""
    words = " ".join(rng.choice("amount card limit city user device history legit fraud".split())
                     for _ in range(rng.choice((1, 5, 30, 120))))
    sampled = {"model": rng.choice(("bundled",) * 3 + ("one", "two")), "max_tokens": rng.choice((1, 4, 16, 64, 200)),
               "temperature": rng.choice((0, 0.7, 1.5)), "stream": rng.random() < .5, "ignore_eos": rng.random() < .3}
    for name, value in (("top_p", .9), ("top_k", 20), ("seed", rng.randrange(99)), ("repetition_penalty", 1.1),
                        ("stop", ["a "]), ("n", 3), ("timeout", 20)):
        if rng.random() < .15:
            sampled[name] = value
    kind = rng.random()
    if kind < .45:
        if rng.random() < .2:
            sampled["logprobs"] = 5
        if rng.random() < .1:
            sampled["guided_json"] = {"type": "object", "properties": {f"f{rng.randrange(40)}": {"type": "boolean"}}}
        return "/v1/completions", {**sampled, "prompt": words}
    if kind < .8:
        tools = {"tools": [TOOL], "tool_choice": "required"} if rng.random() < .1 else {}
        return "/v1/chat/completions", {**sampled, **tools, "messages": [{"role": "user", "content": words}]}
    model = {"model": sampled["model"]}
    if kind < .87:
        return "/score", {**model, "prompt": words, "continuation": " yes"}
    if kind < .94:
        return "/classify", {**model, "input": [words, "x"], "labels": [" yes", " no"]}
    return "/v1/embeddings", {**model, "input": [words, "x"], "pooling": rng.choice(("mean", "last"))}


async def client(http: aiohttp.ClientSession, rng: random.Random, end: float, seen: Counter) -> None:
    """Send random requests until the time `end`, and count their HTTP statuses and failures in `seen`."""
    while time.monotonic() < end:
        path, body = random_request(rng)
        if rng.random() < .05:
            path, body = "/v1/completions", {"model": "bundled", "prompt": "x", "max_tokens": 4, **rng.choice(BAD)}
        leaves = rng.random() < .1
        try:
            async with asyncio.timeout(rng.expovariate(10) if leaves else 120):
                async with http.post(path, json=body) as answer:
                    seen[answer.status] += 1
                    content = await answer.read()
                    if body.get("stream") and answer.status == 200 and b'"error"' in content:
                        seen["errors in streams"] += b'"type":"server_error"' in content
        except TimeoutError:
            seen["left" if leaves else "no answer in 120 s"] += 1
        except aiohttp.ClientError as error:
            seen[f"{type(error).__name__}"] += 1
        await asyncio.sleep(rng.expovariate(20))


async def operator(http: aiohttp.ClientSession, admin: aiohttp.ClientSession, adapter: Path, end: float,
                   seen: Counter) -> None:
    """Load and unload adapters, update and roll back the weights until the time `end`; count statuses in `seen`."""
    rng = random.Random(99)
    while time.monotonic() < end:
        await asyncio.sleep(rng.uniform(1, 4))
        name = rng.choice(("one", "two"))
        doing = rng.random()
        if doing < .55:
            answer = await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(adapter)})
        elif doing < .7:
            answer = await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        elif doing < .9:
            answer = await admin.post("/admin/weights", json={
                "source": "bundled", "policy": rng.choice(("finish_old", "restart")), "wait": True})
        else:
            answer = await admin.post("/admin/weights/rollback")
        seen[f"operator {answer.status}"] += 1
        await answer.read()


async def soak(server: Live, admin_port: int, adapter: Path, args: argparse.Namespace) -> int:
    """Run clients and an operator on the server; return 1 if memory grew, cache pages leaked, or anything failed."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
    seen: Counter = Counter()
    began = time.monotonic()
    end = began + 60 * args.minutes
    memory: list[int] = []
    async with (aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as http,
                aiohttp.ClientSession(f"http://127.0.0.1:{admin_port}",
                                      headers={"Authorization": f"Bearer {KEY}"}) as admin):
        tasks = [asyncio.create_task(client(http, random.Random(number), end, seen)) for number in range(args.clients)]
        tasks.append(asyncio.create_task(operator(http, admin, adapter, end, seen)))
        with tqdm(total=60 * args.minutes, unit="s", desc="soak", file=sys.stderr) as bar:
            while (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(5, left))
                bar.update(min(5, max(0, left)))
                memory.append(sum(process.memory_info().rss for process in processes))
                bar.set_postfix_str(f"{memory[-1] / 1e6:,.0f} MB, {sum(seen.values())} requests")
        await asyncio.gather(*tasks)
    figures = server.wait_until_free(60)
    warm = memory[max(0, len(memory) // 10 - 1)]
    last = sum(process.memory_info().rss for process in processes)
    growth = last / warm - 1
    bad = {key: count for key, count in seen.items() if isinstance(key, int) and key >= 500}
    wrong = bad or any(count for key, count in seen.items() if isinstance(key, str) and (
        not key.startswith(("left", "operator")) or key.startswith("operator 5")))
    print(f"{args.minutes} minutes, {sum(seen.values()):,} requests: {dict(sorted(seen.items(), key=str))}")
    print(f"resident memory {warm / 1e6:,.1f} MB after a tenth of the time, {last / 1e6:,.1f} MB in the end: "
          f"{growth:+.1%}; largest {max(memory) / 1e6:,.1f} MB")
    print(f"pages held {figures['pages_used']}, compilations {figures['compiles_after_warmup']}, weight version "
          f"{figures['weight_version']}, preemptions {figures['preemptions']}, status 500 and more: {bad or 'none'}")
    return int(bool(wrong) or growth > .03 or figures["pages_used"] > 0 or figures["compiles_after_warmup"] > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        adapter, keys, admin_port = Path(root) / "adapter", Path(root) / "keys", free_port()
        save_random_adapter(adapter)
        keys.write_text(KEY)
        model = model_with_tools(Path(root) / "model")
        options = ["--max-seq-len", "1024", "--max-batch-size", "8", "--dtype", "float32", "--max-adapters", "2",
                   "--kv-cache-bytes", str(32 * PAGE_BYTES), "--served-model-name", "bundled", "--admin-port",
                   str(admin_port), "--admin-keys", str(keys), "--public-adapters", "--adapter-dir", root]
        server = Live(*options, model=str(model), quick=False)
        try:
            return asyncio.run(soak(server, admin_port, adapter, args))
        finally:
            for line in server.output().splitlines():
                if "Traceback" in line or " ERROR " in line:
                    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
