"""Compare the int8 and int4 products for CPUs with float64 on random shapes, with every instruction set of a machine.

    python scripts/bench/cpu_shapes.py [--shapes 10000] [--seed 0]

Under sanitizers:

    export QWEN_JAX_KERNEL_FLAGS="-fsanitize=address,undefined -g" ASAN_OPTIONS=detect_leaks=0
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" \
        python scripts/bench/cpu_shapes.py --shapes 500
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from qwen_kernels.cpu import GROUP, MOST_ROWS, int4_product, int8_product, library, pack_int4  # noqa: E402
from tqdm import trange  # noqa: E402

BFLOAT16 = b"AVX-512 with bfloat16"
SETS = (BFLOAT16, b"AVX-512", b"AVX2", b"portable")
MOST = 1e-6  # times the sum of the absolute terms: float32's rounding of a sum


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kernels, random, wrong, worst = library(), np.random.default_rng(args.seed), 0, 0.0
    if kernels is None:
        raise SystemExit("the kernels cannot be compiled here")
    sets = [name for name in SETS if kernels.qwen_use_instruction_set(name)]
    for number in trange(args.shapes, file=sys.stderr):
        kernels.qwen_use_instruction_set(sets[number % len(sets)])
        groups, rows = int(random.integers(1, 4)), int(random.integers(1, MOST_ROWS + 1))
        inputs, outputs = (int(size) for size in random.integers(1, (700, 400)))
        four_bits = bool(random.integers(2))
        inputs = -(-inputs // GROUP) * GROUP if four_bits else inputs
        x = random.standard_normal((groups, rows, inputs)).astype(np.float32) * 10 ** random.uniform(-6, 6)
        x = jnp.asarray(x, jnp.bfloat16 if sets[number % len(sets)] == BFLOAT16 else jnp.float32)
        if four_bits:
            values = random.integers(-8, 8, (groups, outputs, inputs))
            scale = jnp.asarray(random.uniform(-10, 10, (groups, outputs, inputs // GROUP)), jnp.bfloat16)
            found = int4_product(x, pack_int4(jnp.asarray(values)), scale)
            scale = np.repeat(np.asarray(scale, np.float64), GROUP, axis=-1)
        else:
            values = random.integers(-128, 128, (groups, outputs, inputs))
            scale = random.uniform(1e-4, 10, (groups, outputs, 1)).astype(np.float32)
            found = int8_product(x, jnp.asarray(values, jnp.int8), jnp.asarray(scale[..., 0]))
        found, x, weights = np.asarray(found, np.float64), np.asarray(x, np.float64), values * scale.astype(np.float64)
        if four_bits and sets[number % len(sets)] == b"AVX2":
            x = rounded_to_int8(x)
        expected, terms = (np.einsum("gmi,goi->gmo", part(x), part(weights)) for part in (np.asarray, np.abs))
        error = float(np.max(np.abs(found - expected) / np.maximum(terms, 1e-300)))
        worst, wrong = max(worst, error), wrong + (error > MOST)
    names = ", ".join(name.decode() for name in sets)
    print(f"{args.shapes} shapes, {names}: {wrong} wrong, largest error {worst:.1e}")
    return int(wrong > 0)


def rounded_to_int8(x: np.ndarray) -> np.ndarray:
    """Round each group of inputs to int8, as the int4 product does with AVX2; all in float32 as there."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, GROUP)
    most = np.max(np.abs(groups), axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return (np.rint(groups * inverse).astype(np.float64) * (most / np.float32(127))).reshape(x.shape)


if __name__ == "__main__":
    sys.exit(main())
