"""Count the arithmetic operations of sparse attention by context length: selecting pages, and attending to them.

    python scripts/bench/sparse_operations.py [--lengths 4096,...,262144] [--budget 3]

Nothing runs. The operations of selection are counted in its traced program: every product, sum, comparison and
exponential of every block of queries, padding included. Attention is counted from the pages that a block of queries
attends to. 0.5B shape, the share of one KV head of a layer; the dense tail (the last tokens of a prompt, which attend
to everything) is linear in the context and counted apart. Growth is the exponent between 16,384 tokens and the last
length.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.extend.core import ClosedJaxpr, Jaxpr  # noqa: E402
from qwen_kernels.attention import PAGE  # noqa: E402
from qwen_kernels.sparse_attention import Sparsity, new_summaries, select, update_summaries  # noqa: E402

GROUP, DIM = 7, 64
ONCE = {"reduce_max", "reduce_min", "reduce_sum", "reduce_or", "reduce_and", "argmax"}  # one per input element
MOVES = {"broadcast_in_dim", "reshape", "transpose", "slice", "dynamic_slice", "dynamic_update_slice", "concatenate",
         "gather", "squeeze", "convert_element_type", "iota", "pad", "bitcast_convert_type", "copy", "scatter", "rev"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536,131072,262144")
    parser.add_argument("--budget", type=float, default=Sparsity.budget)
    args = parser.parse_args()
    sparsity = Sparsity(budget=args.budget)
    print(f"{'tokens':>8}{'summaries':>12}{'selection':>12}{'attention':>12}{'dense tail':>12}{'sum':>12}{'full':>12}"
          f"{'full / sum':>12}   operations of one KV head")
    sums = {}
    for length in map(int, args.lengths.split(",")):
        pages = length // PAGE
        page = GROUP * PAGE * PAGE * (4 * DIM + 8)  # two products; scaling, exponential, maximum, sum and corrections
        tail = -(-sparsity.dense_tail // PAGE)
        parts = [*selection_of(length, sparsity), page * sum(taken(own, sparsity) for own in range(pages - tail)),
                 page * sum(range(pages - tail + 1, pages + 1))]
        full = page * pages * (pages + 1) // 2
        sums[length] = sum(parts[:3])
        print(f"{length:>8}" + "".join(f"{part:>12.3e}" for part in (*parts, sum(parts), full))
              + f"{full / sum(parts):>12.1f}", flush=True)
    last = max(sums)
    if 16384 in sums and last > 16384:
        growth = math.log(sums[last] / sums[16384]) / math.log(last / 16384)
        print(f"growth without the dense tail from 16384 to {last}: exponent {growth:.3f}")
    return 0


def taken(own: int, sparsity: Sparsity) -> int:
    """Return how many pages the queries of page number `own` attend to at most: first, last and selected pages."""
    return min(own + 1, sparsity.sink + sparsity.local + sparsity.ranked(own))


def selection_of(length: int, sparsity: Sparsity) -> tuple[int, int]:
    """Count the operations of summarising the pages of a prompt, and of selecting pages for all its queries."""
    pages = length // PAGE
    q = jax.ShapeDtypeStruct((1, length, 1, GROUP, DIM), jnp.float32)
    k = jax.ShapeDtypeStruct((pages + 1, 1, PAGE, DIM), jnp.float32)
    table, number = jax.ShapeDtypeStruct((1, pages), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    summaries = jax.eval_shape(lambda k: new_summaries(k, pages), k)
    update = jax.make_jaxpr(lambda *arrays: update_summaries(*arrays, length))(summaries, k, table, number, number)
    choose = jax.make_jaxpr(lambda q, k, summaries, table, number: select(
        q, k, summaries, table, start=number, length=number, prompt_length=number, sparsity=sparsity))
    selection = choose(q, k, summaries, table, number)
    return operations(update.jaxpr), operations(selection.jaxpr)


def operations(jaxpr: Jaxpr) -> int:
    """Count the arithmetic operations of a traced program in which every loop has a known number of rounds."""
    total = 0
    for equation in jaxpr.eqns:
        name, size = equation.primitive.name, max((math.prod(x.aval.shape) for x in equation.outvars), default=0)
        if name == "while":
            raise ValueError("a loop of unknown length")
        inner = [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
                 if isinstance(value, Jaxpr | ClosedJaxpr)]
        if name == "scan":
            total += equation.params["length"] * sum(map(operations, inner))
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name in ("sort", "top_k"):
            row = equation.invars[0].aval.shape[-1]
            total += int(math.prod(equation.invars[0].aval.shape) * math.log2(max(row, 2)))
        elif inner:
            total += sum(map(operations, inner))
        elif name in ONCE:
            total += math.prod(equation.invars[0].aval.shape)
        elif name not in MOVES:
            total += size
    return total


if __name__ == "__main__":
    sys.exit(main())
