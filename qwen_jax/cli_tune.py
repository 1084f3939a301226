"""The command line's part about tuning."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from qwen_jax.errors import UserError


def tune(args: argparse.Namespace) -> None:
    from qwen_jax.tuning.engine_bench import Lab
    from qwen_jax.tuning.tune import Tuner, ratios

    if not args.budget_minutes > 0:
        raise UserError(f"--budget-minutes must be a positive number, not {args.budget_minutes:g}")
    progress = sys.stderr.isatty() or not args.json
    lab = Lab(args.model, args.dtype, args.fp8, args.max_batch_size, args.max_seq_len, progress)
    try:
        found = Tuner(lab, args.budget_minutes, progress).run()
    except KeyboardInterrupt:
        print("what was measured is kept: run it again to go on from there", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps({"path": str(found.path), **found.measured}))
        return
    stored, faster = found.measured, ratios(found)
    if not stored["accepted"]:
        print(f"nothing was faster than the defaults on every trace: the defaults stay ({found.path})")
        return
    for name, choice in stored["choices"].items():
        if "default" in choice:
            gain = f"  predicted gain {choice['gain']:.2f} x" if "gain" in choice else ""
            print(f"{name}: {_short(choice['default'])} -> {_short(choice['value'])}{gain}")
    print(*(f"{name} {ratio:.2f} x" for name, ratio in faster.items()), sep=", ")
    print(found.path)


def _short(value: Any) -> str:
    """A list of shapes as 1x64 8x64."""
    if not isinstance(value, list | tuple):
        return str(value)
    most = [item for item in value if not isinstance(item, int) or item <= 1024]
    return " ".join("x".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in most)


def add_tune(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """commands: the parser's; command: adds one with a function and a sentence."""
    parser = command("tune", tune, "Measure this device and find the shapes and thresholds that a model runs fastest "
                     "with. The result is kept in the user's cache, where engines look for it.")
    parser.add_argument("model")
    parser.add_argument("--budget-minutes", type=float, default=10, metavar="M", help="that it may take (default 10)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the engine")
    parser.add_argument("--fp8", action="store_true", help="for engines with 8-bit weights and KV cache")
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--max-seq-len", type=int, help="default: 4096 or the model's context if shorter")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout: what the file holds")
