"""Compare this engine's speed with llama.cpp's: prefill of 512 tokens, decode of one sequence, same weights.

    python scripts/bench/llama_cpp.py --python ENV/bin/python [--rounds 5] [--type f16] [--folder HF]

Both run in alternation. 0.5B shape with random weights, or a Hugging Face folder in bf16. Ours runs in bf16; llama.cpp
reads a GGUF of the same weights in f16 (or bf16), written by `llama_cpp_runner.py`. A decode step of llama.cpp gets its
token as an argument, a decode step of ours samples it (greedy). Ratios are llama.cpp's time over ours: above 1, we are
faster.

ENV has llama-cpp-python, which is published as source only. Building it needs a C++ compiler and CMake 3.21 or newer,
and takes several minutes on two cores:

    python3.11 -m venv ENV && ENV/bin/pip install gguf==0.19.0
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 \\
        ENV/bin/pip install llama-cpp-python==0.3.36
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
from start import make_checkpoint  # noqa: E402
from workload import Peer, exactly, say, seconds, token_ids  # noqa: E402

from qwen_jax import Engine  # noqa: E402

PREFILL, PROMPT = 512, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the Python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decode steps per measurement")
    parser.add_argument("--type", default="f16", choices=["f16", "bf16"])
    parser.add_argument("--preset", default="qwen2.5-0.5b")
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of the preset's random weights")
    args = parser.parse_args()
    if not 1 <= args.tokens <= PROMPT:
        parser.error(f"--tokens must be from 1 to {PROMPT}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or make_checkpoint(args.preset, Path(scratch) / "hf")
        peer = Peer(args.python, "llama_cpp_runner.py")
        peer.ask(folder=str(folder), gguf=str(Path(scratch) / "model.gguf"), type=args.type, context=1024)
        compare(Engine.from_pretrained(folder, warmup="full", max_batch_size=1, max_seq_len=1024,
                                       prefix_cache=False), peer, args)
        peer.close()


def compare(engine: Engine, peer: Peer, args) -> None:
    """Time the engine and llama.cpp (``peer``) in alternation; print tokens per second of both, and their ratio."""
    def ours(prompt: list[int], tokens: int) -> float:
        return seconds(lambda: engine.generate([prompt], exactly(tokens)))

    rng = np.random.default_rng(0)
    measures = {f"prefill {PREFILL}": (PREFILL, []), "decode, batch 1": (args.tokens, [])}
    for round_ in range(args.rounds + 1):  # the first warms up
        long, short = (token_ids(rng, size, engine.config.vocab_size) for size in (PREFILL, PROMPT))
        prefill = ours(long, 1), peer.ask(tokens=long, more=0)["prefill"]
        decode = ours(short, 1 + args.tokens) - ours(short, 1), peer.ask(tokens=short, more=args.tokens)["decode"]
        for (name, (_, times)), pair in zip(measures.items(), (prefill, decode)):
            times.append(pair)
            say(f"round {round_} {name}: ours {pair[0]:.2f} s, llama.cpp {pair[1]:.2f} s")
    print(f"{'':18} {'ours':>10} {'llama.cpp':>10} {'ratio':>7}   tokens/s, medians of {args.rounds} alternating "
          f"rounds, bf16 against {args.type}")
    for name, (tokens, times) in measures.items():
        our, their = map(statistics.median, zip(*times[1:]))
        print(f"{name:18} {tokens / our:10.1f} {tokens / their:10.1f} {their / our:7.2f}")


if __name__ == "__main__":
    main()
