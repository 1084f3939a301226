"""Update an engine's weights under load; print how many requests fail and how long their answers pause.

    python scripts/bench/update.py [--clients 8] [--layers 24]

0.5B shape, random weights, bf16. Clients send requests without pause while a checkpoint with other weights is loaded,
checked, tried on golden prompts and made current. The script prints the gaps between steps before the update, while it
is loaded, and around the switch.
"""
import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen_jax import AsyncEngine, Engine, ModelConfig, SamplingParams
from qwen_jax.checkpoint import save_hf
from qwen_jax.model import init


async def measure(engine: Engine, folder: Path, clients: int) -> None:
    """Update to the weights in `folder` under the load of `clients` clients, and print the gaps between steps."""
    serving, rng = AsyncEngine(engine), np.random.default_rng(0)
    pieces, failed, stop = [], [], asyncio.Event()  # pieces: (client, time, whether it has tokens)

    async def client(number: int) -> None:
        while not stop.is_set():
            prompt = rng.integers(0, 100_000, 48).tolist()
            # Answers have different lengths, so that prompts do not arrive at once.
            params = SamplingParams(max_tokens=int(rng.integers(24, 128)), temperature=0.0, ignore_eos=True)
            async for delta in serving.stream(prompt, params):
                pieces.append((number, time.perf_counter(), bool(delta.token_ids)))
            if delta.finish_reason != "length":
                failed.append(delta.finish_reason)

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.sleep(20)
    before = time.perf_counter()
    switched = asyncio.create_task(serving.update_weights(folder))
    await switched
    after = time.perf_counter()
    await asyncio.sleep(20)
    stop.set()
    await asyncio.gather(*tasks)
    stats = await serving.stats()
    await serving.close()
    times = sorted(moment for _, moment, new in pieces if new)
    ends = [times[0]]  # ends of steps: the pieces of a step arrive together
    for moment in times:
        if moment - ends[-1] > 0.005:
            ends.append(moment)
    gaps = [(end, end - start) for start, end in zip(ends, ends[1:])]

    def show(name: str, seconds: list[float]) -> None:
        print(f"{name:28} median {statistics.median(seconds) * 1e3:5.0f} ms, longest {max(seconds) * 1e3:5.0f} ms, "
              f"{len(seconds)} gaps")

    show("between steps, before", [gap for end, gap in gaps if end < before])
    show("while loading and trying", [gap for end, gap in gaps if before <= end < after])
    show("in 3 seconds after the switch", [gap for end, gap in gaps if after <= end < after + 3])
    show("afterwards", [gap for end, gap in gaps if after + 3 <= end])
    print(f"the update took {after - before:.1f} s; failed: {len(failed)}; compiles after warm-up: "
          f"{stats.compiles_after_warmup}; version {stats.weight_version}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    config = replace(ModelConfig.preset("qwen2.5-0.5b"), num_layers=args.layers)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(init(config, 1, "bfloat16"), config, Path(folder) / "new")
        engine = Engine(init(config, 0, "bfloat16"), warmup="full", max_batch_size=8, max_seq_len=512)
        print("running", file=sys.stderr)
        asyncio.run(measure(engine, Path(folder) / "new", args.clients))


if __name__ == "__main__":
    main()
