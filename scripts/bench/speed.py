"""Compare the engine's speed of prefill and of decode with transformers.generate's: 0.5B shape, bf16, random weights.

    python scripts/bench/speed.py [--rounds 3] [--batches 1,8,32]

Prefill is the time from one prompt of 1024 tokens to its first token. Decode is the time per token after the first,
with 32-token prompts. Both sides alternate in one run. Ratios are transformers' time over ours: above 1, we are faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from qwen_jax import DeepSeekEngine, ModelConfig, SamplingParams  # noqa: E402

PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=17, help="generated tokens per decode measurement")
    parser.add_argument("--preset", default="qwen2.5-0.5b")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    hf = Qwen2ForCausalLM(Qwen2Config.from_dict(ModelConfig.preset(args.preset).to_hf())).to(torch.bfloat16).eval()
    hf.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as cache:
        engine = DeepSeekEngine(model=hf, warmup="full", dtype="bfloat16", cache_dir=cache, max_seq_len=2048)
    stats = engine.stats()
    print(f"cold warm-up: {stats.warmup_seconds:.0f} s for {stats.executables} executables; "
          f"cpu {'with' if 'avx512_bf16' in open('/proc/cpuinfo').read() else 'without'} native bf16")

    rng = np.random.default_rng(0)
    measures = {"prefill 1024": prefill(hf, engine, rng)}
    for batch in map(int, args.batches.split(",")):
        measures[f"decode, batch {batch}"] = decode(hf, engine, rng, batch, args.tokens)
    print(f"{'':18} {'ours':>10} {'transf.':>10} {'ratio':>7}   tokens/s, medians of {args.rounds} alternating rounds")
    for name, (tokens, ours, theirs) in measures.items():
        times = [[], []]
        for _ in range(args.rounds):
            times[0].append(ours())
            times[1].append(theirs())
            print(f"  {name}: {times[0][-1]:.2f} s, {times[1][-1]:.2f} s", file=sys.stderr, flush=True)
        our, their = map(statistics.median, times)
        print(f"{name:18} {tokens / our:10.1f} {tokens / their:10.1f} {their / our:7.2f}", flush=True)
    print(f"compiles after warm-up: {engine.stats().compiles_after_warmup}")


def prefill(hf, engine, rng):
    """Return the number of tokens to prefill, and two functions that time it: with the engine, with transformers."""
    prompt = rng.integers(0, 150_000, 1024).tolist()
    return 1024, lambda: ours(engine, [prompt], 1), lambda: theirs(hf, [prompt], 1)


def decode(hf, engine, rng, batch, count):
    """Return the number of tokens to decode, and two functions that time it: with the engine, with transformers."""
    prompts = rng.integers(0, 150_000, (batch, PROMPT)).tolist()
    return (batch * (count - 1), lambda: ours(engine, prompts, count) - ours(engine, prompts, 1),
            lambda: theirs(hf, prompts, count) - theirs(hf, prompts, 1))


def ours(engine, prompts, count) -> float:
    """Return the seconds in which the engine generates `count` tokens for each prompt."""
    began = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_tokens=count, temperature=0.0))
    return time.perf_counter() - began


@torch.no_grad()
def theirs(hf, prompts, count) -> float:
    """Return the seconds in which transformers generates `count` tokens for each prompt."""
    tokens = torch.tensor(prompts)
    began = time.perf_counter()
    hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
