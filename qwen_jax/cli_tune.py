"""Subcommand ``tune``, which finds an engine's fastest settings on this device."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from qwen_jax.cli_options import add_command, add_model, add_options
from qwen_jax.errors import UserError
from qwen_jax.serving.options import EngineOptions


def tune(args: argparse.Namespace) -> None:
    from qwen_jax.tuning.engine_bench import EngineBench
    from qwen_jax.tuning.tune import Tuner, ratios

    if not args.budget_minutes > 0:
        raise UserError(f"--budget-minutes must be a positive number, not {args.budget_minutes:g}")
    progress = sys.stderr.isatty() or not args.json
    bench = EngineBench(args.model, dtype=args.dtype, fp8_enabled=args.fp8, max_batch_size=args.max_batch_size,
              max_seq_len=args.max_seq_len, progress=progress)
    try:
        tuned = Tuner(bench, args.budget_minutes, progress).run()
    except KeyboardInterrupt:
        print("what was measured is kept: run it again to go on from there", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps({"path": str(tuned.path), **tuned.measured}))
        return
    stored, faster = tuned.measured, ratios(tuned)
    if not stored["accepted"]:
        print(f"nothing was faster than the defaults on every trace: the defaults stay ({tuned.path})")
        return
    for name, choice in stored["choices"].items():
        if "default" in choice:
            gain = f"  predicted gain {choice['gain']:.2f} x" if "gain" in choice else ""
            print(f"{name}: {_short(choice['default'])} -> {_short(choice['value'])}{gain}")
    print(*(f"{name} {ratio:.2f} x" for name, ratio in faster.items()), sep=", ")
    print(tuned.path)


def _short(value: Any) -> str:
    """Return a setting's value as a short text; a list of shapes as ``1x64 8x64``."""
    if not isinstance(value, list | tuple):
        return str(value)
    items = [item for item in value if not isinstance(item, int) or item <= 1024]
    return " ".join("x".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in items)


def add_tune(commands: Any) -> None:
    parser = add_command(commands, "tune", tune, "Measure this device and find the shapes and thresholds that a model "
                         "runs fastest with. The result is kept in the user's cache, where engines look for it.")
    add_model(parser)
    parser.add_argument("--budget-minutes", type=float, default=10, metavar="M", help="minutes that it may take "
                        "(default: 10)")
    add_options(parser, EngineOptions, ("dtype", "fp8_enabled", "max_batch_size", "max_seq_len"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout: what the file holds")
