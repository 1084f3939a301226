"""Time a layer of attention by context length: sparse attention, our full attention, and torch's.

    python scripts/bench/sparse.py [--lengths 4096,16384,65536] [--rounds 3] [--full-up-to 16384] [--torch-up-to 16384]

0.5B shape (14 query heads, 2 KV heads of 64), bf16, random values, the whole prompt at once with an empty cache; the
queries of the last two pages attend to everything. torch runs in bf16 and in float32, which is several times faster on
processors without bf16 products. Rounds alternate; medians. Growth is the exponent between the first and the last
length.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402
from qwen_kernels.attention import PAGE, page_dtype, paged_attention  # noqa: E402
from qwen_kernels.attention.storage import to_storage  # noqa: E402
from qwen_kernels.sparse_attention import Sparsity, attend, new_summaries, select, update_summaries  # noqa: E402
from workload import say, seconds  # noqa: E402

KV_HEADS, GROUP, DIM = 2, 7, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full-up-to", type=int, default=16384, help="longest context for our full attention")
    parser.add_argument("--torch-up-to", type=int, default=16384, help="longest context for torch's attention")
    parser.add_argument("--budget", type=float, default=Sparsity.budget)
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    medians = {}
    for length in lengths:
        runs = contenders(length, Sparsity(budget=args.budget), args)
        times = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(seconds(run))
        medians[length] = {name: statistics.median(values) for name, values in times.items()}
        say(f"{length} tokens: " + ", ".join(f"{name} {value:.2f} s" for name, value in medians[length].items()))
    names = list(medians[lengths[0]])
    print(f"{'tokens':>8}" + "".join(f"{name:>15}" for name in names)
          + "   full/sparse  torch bf16/sparse  selection's share")
    for length, row in medians.items():
        cells = "".join(f"{row[name]:>14.3f}s" if name in row else f"{'-':>15}" for name in names)
        ratio = [row[name] / row["sparse"] if name in row else math.nan for name in ("full", "torch bf16")]
        print(f"{length:>8}{cells}   {ratio[0]:>11.2f}  {ratio[1]:>17.2f}  {row['selection'] / row['sparse']:>17.0%}")
    first, last = lengths[0], lengths[-1]
    if last > first:
        growth = math.log(medians[last]["sparse"] / medians[first]["sparse"]) / math.log(last / first)
        print(f"growth of sparse from {first} to {last}: exponent {growth:.2f}")
    return 0


def contenders(length: int, sparsity: Sparsity, args) -> dict:
    """Return functions, by name, that each run one layer's attention once on a prompt of `length` tokens."""
    pages, keys = length // PAGE, jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, length, KV_HEADS, GROUP, DIM), jnp.bfloat16)
    k, v = (to_storage(jax.random.normal(key, (pages + 1, KV_HEADS, PAGE, DIM), jnp.bfloat16), page_dtype(jnp.bfloat16))
            for key in keys[1:])
    table = jnp.arange(1, pages + 1)[None]
    start, whole = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)

    @jax.jit
    def choose(q, k):
        summaries = update_summaries(new_summaries(k, pages), k, table, start=start, length=whole, tokens=length)
        return select(q, k, summaries, table, start=start, length=whole, prompt_length=whole, sparsity=sparsity)

    mix = jax.jit(lambda q, k, v, selection: attend(q, k, v, table, start=start, length=whole, selection=selection))
    full = jax.jit(lambda q, k, v: paged_attention(q, k, v, table, start=start, length=whole))
    runs = {"sparse": lambda: jax.block_until_ready(mix(q, k, v, choose(q, k))),
            "selection": lambda: jax.block_until_ready(choose(q, k))}
    if length <= args.full_up_to:
        runs["full"] = lambda: jax.block_until_ready(full(q, k, v))
    if length <= args.torch_up_to:
        for name, dtype in (("torch bf16", torch.bfloat16), ("torch float32", torch.float32)):
            runs[name] = partial(_torch, *(torch.randn(1, heads, length, DIM).to(dtype) for heads in
                                           (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)))
    return runs


def _torch(q, k, v):
    with torch.no_grad():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


if __name__ == "__main__":
    sys.exit(main())
