"""Run a model that was exported to StableHLO. Needs jax, safetensors and flatbuffers, and no qwen-jax.

    python run.py 12 345 6 --max-tokens 16                      token ids in, token ids that follow out (greedy)
    python run.py --tokens tokens.npy --logits logits.npy       integers [B, T] in, float32 [B, T, V] out
"""

import argparse
import json
from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors.flax import load_file

PROGRAM, PARAMETERS = "logits.jaxexport", "parameters.safetensors"
PAD = 64  # lengths are rounded up to multiples of this: each length is compiled once


def main() -> None:
    """Continue the token ids of the command line, or compute the logits of a file of tokens."""
    parser = argparse.ArgumentParser(description="Continue token ids greedily, or compute logits.")
    parser.add_argument("ids", nargs="*", type=int, help="the token ids to continue")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--tokens", metavar="FILE.npy", help="integers [B, T]; instead of ids")
    parser.add_argument("--logits", metavar="FILE.npy", help="write logits, float32 [B, T, V], instead of continuing")
    args = parser.parse_args()
    tokens = np.load(args.tokens) if args.tokens else np.array([args.ids])
    if tokens.size == 0:
        parser.error("give token ids or --tokens")

    folder = Path(__file__).resolve().parent
    logits = jax.jit(jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes())).call)
    parameters = load_file(folder / PARAMETERS)
    if args.logits:
        np.save(args.logits, np.asarray(logits(parameters, tokens.astype(np.int32))))
        return
    stop = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    for row in tokens.tolist():
        for _ in range(args.max_tokens):
            padded = np.zeros((1, -(-len(row) // PAD) * PAD), np.int32)  # logits do not depend on what follows
            padded[0, :len(row)] = row
            row.append(int(logits(parameters, padded)[0, len(row) - 1].argmax()))
            print(row[-1], end=" ", flush=True)
            if row[-1] in stop:
                break
        print()


if __name__ == "__main__":
    main()
