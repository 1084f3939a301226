"""Subcommands about a model's files, sizes and compiled programs: convert, export, info, compile, plan."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from qwen_jax.cli_options import add_command, add_model, add_options
from qwen_jax.errors import UserError
from qwen_jax.serving.options import EngineOptions

SIZES = ("dtype", "weights", "max_batch_size", "max_seq_len", "kv_cache_bytes")  # what shapes of programs follow


def convert(args: argparse.Namespace) -> None:
    from qwen_jax.checkpoint import convert

    print(convert(args.src, args.dst, dtype=args.dtype, fp8=args.fp8, processes=args.processes))


def export(args: argparse.Namespace) -> None:
    from qwen_jax.checkpoint import export, export_gguf, export_stablehlo

    if args.format == "hf":
        if args.dtype is not None:
            raise UserError("the format hf keeps the stored element type: leave --dtype out, or name it to "
                            "qwen-jax convert")
        print(export(args.src, args.dst))
        return
    options = {} if args.dtype is None else {"dtype": args.dtype}
    print((export_gguf if args.format == "gguf" else export_stablehlo)(args.src, args.dst, **options))


def info(args: argparse.Namespace) -> None:
    if args.buckets:
        _print_buckets(_compile(args, ...), args.json)
        return
    facts = _memory(args) if args.memory else _facts(args.model)
    if args.json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}")


def plan(args: argparse.Namespace) -> None:
    from qwen_jax.checkpoint.source import find_config
    from qwen_jax.parallel.hardware import hardware
    from qwen_jax.parallel.planner import PlanRequest, plans, same_memory
    from qwen_jax.parallel.report import as_rows, as_text
    from qwen_jax.quantization import default_precision

    if args.xla_flags:
        print(*hardware(args.device).xla_flags)
        return
    config, _ = find_config(args.model)
    memory = same_memory(args.memory_gb) if args.memory_gb else None
    precision = default_precision(config, True, "e4m3") if args.fp8 else None
    report = plans(PlanRequest(config, hardware(args.device), devices=args.devices, batch=args.batch, seq_len=args.seq,
                               dtype=args.dtype, precision=precision, memory=memory), args.objective)
    if args.json:
        for row in as_rows(report):
            print(json.dumps(row))
    else:
        print(as_text(report))


def compile_programs(args: argparse.Namespace) -> None:
    engine = _compile(args, args.output)
    print(f"{len(engine.runner.executables.programs)} programs in {args.output}")


def _compile(args: argparse.Namespace, cache_dir: Any) -> Any:
    """Return an engine without weights whose programs are compiled and stored in ``cache_dir``.

    ``cache_dir`` may be ``...`` for the folder in the user's cache.
    """
    from qwen_jax.engine.engine import Engine

    engine = Engine.without_weights(args.model, cache_dir=cache_dir, **{name: getattr(args, name) for name in SIZES})
    engine.runner.compile(progress=sys.stderr.isatty() or not getattr(args, "json", False))
    return engine


def _print_buckets(engine: Any, as_json: bool) -> None:
    """Print the operations, memory and preparation time of each bucket's program (one per shape of a step)."""
    rows = []
    for bucket in engine.runner.table:
        programs = engine.runner.programs.of(bucket)
        runs = [engine.runner.executables.programs[key] for key in engine.runner.steps.runs(bucket)]
        rows.append({"bucket": str(bucket), "gflops": sum(program.flops for program in runs) / 1e9,
                     "accessed_mb": sum(program.bytes_accessed for program in runs) / 1e6,
                     "temporary_mb": max(program.temp_bytes for program in programs) / 1e6,
                     "seconds": engine.runner.programs.seconds[bucket],
                     "from_disk": all(program.from_disk for program in programs)})
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    width = max(len(row["bucket"]) for row in rows)
    print(f"{'bucket':{width}}  {'GFLOP':>9} {'MB accessed':>12} {'MB temporary':>13} {'s to prepare':>13}")
    for row in rows:
        how = "from disk" if row["from_disk"] else "compiled"
        print(f"{row['bucket']:{width}}  {row['gflops']:>9.1f} {row['accessed_mb']:>12,.0f} "
              f"{row['temporary_mb']:>13,.0f} {row['seconds']:>13.1f}  {how}")
    print("GFLOP and MB accessed: of one micro-batch of a prefill, of one token per row in decode.")


def _memory(args: argparse.Namespace) -> dict[str, Any]:
    """Return the bytes of a model's weights and KV cache, and what fits on a device of ``--memory-gb``."""
    from qwen_jax.checkpoint.source import find_config
    from qwen_jax.engine.config.memory import memory_report
    from qwen_jax.engine.config.resolve import chosen_weights, precision_of

    if not args.memory_gb > 0:
        raise UserError(f"--memory-gb must be the device's memory in GB, a positive number, not {args.memory_gb:g}")
    config, where = find_config(args.model)
    weights = chosen_weights(args.weights, args.fp8)
    precision = precision_of(config, args.fp8, "auto", weights=weights)
    weights = weights or ("e4m3" if args.fp8 else "bfloat16")
    return {"model": where, "fp8": args.fp8, "weights": weights,
            **memory_report(config, "bfloat16", precision, int(args.memory_gb * 1e9))}


def _facts(ref: str) -> dict[str, Any]:
    """Return the architecture and the sizes (parameters, bytes) of a model or a preset, without loading weights."""
    from qwen_jax.checkpoint.source import find_config

    config, where = find_config(ref)
    element = 4 if config.dtype == "float32" else 2
    facts = {"model": where, "parameters": config.num_parameters,
             "weight_bytes": config.num_parameters * element,
             "kv_bytes_per_token": 2 * config.num_layers * config.num_kv_heads * config.head_dim * element,
             "max_context": config.max_context}
    fields = dataclasses.asdict(config)
    rope = fields.pop("rope")
    facts |= {name: value for name, value in fields.items() if value is not None}
    facts["rope_theta"] = rope["theta"]
    facts["yarn_factor"] = rope["yarn"]["factor"] if rope["yarn"] else 1
    return facts


def add_convert(commands: Any) -> None:
    parser = add_command(commands, "convert", convert, "Convert a Hugging Face model to a new Orbax checkpoint.")
    parser.add_argument("src", metavar="SRC", help="Hugging Face folder or hub id")
    parser.add_argument("dst", metavar="DST", help="folder of the new checkpoint")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="element type (default: each tensor's own)")
    parser.add_argument("--fp8", action="store_true", help="e4m3 weights in all layers but the first and the last")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share the work "
                        "(default: 1)")


def add_export(commands: Any) -> None:
    parser = add_command(commands, "export", export, "Write a model for other programs: a converted checkpoint as a "
                         "Hugging Face folder; any model as GGUF for llama.cpp, or as StableHLO.")
    parser.add_argument("src", metavar="SRC", help="MODEL")
    parser.add_argument("dst", metavar="DST", help="new folder or file")
    parser.add_argument("--format", choices=["hf", "gguf", "stablehlo"], default="hf", help="what is written "
                        "(default: hf)")
    parser.add_argument("--dtype", help="element type; gguf: float16 (default), bfloat16, q8_0; stablehlo: bfloat16 "
                        "(default), float16, float32")


def add_info(commands: Any) -> None:
    parser = add_command(commands, "info", info, "Show a model's architecture and sizes, from its configuration alone.")
    add_model(parser, or_preset=True)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; with --buckets, one per bucket")
    parser.add_argument("--buckets", action="store_true", help="costs of an engine's programs, which are compiled "
                        "for that")
    parser.add_argument("--memory", action="store_true", help="bytes of weights and KV cache, and what fits on a "
                        "device")
    parser.add_argument("--fp8", action="store_true", help="with --memory: e4m3 weights and KV cache")
    parser.add_argument("--memory-gb", type=float, default=80, metavar="GB", help="memory of the device (default: 80)")
    add_options(parser, EngineOptions, SIZES)


def add_compile(commands: Any) -> None:
    parser = add_command(commands, "compile", compile_programs, "Compile an engine's programs ahead of its deployment, "
                         "without its weights. The engine finds them with cache_dir=DIR and the same sizes, on the "
                         "same kind of device.")
    add_model(parser, or_preset=True)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder of the programs")
    add_options(parser, EngineOptions, SIZES)


def add_plan(commands: Any) -> None:
    parser = add_command(commands, "plan", plan, "Say how a model can be divided over several devices, and what each "
                         "way costs.")
    add_model(parser, or_preset=True)
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="number of devices")
    parser.add_argument("--device", default="h100", help="kind of device: a10, a100, a100-40, h100, h200, cpu "
                        "(default: h100)")
    parser.add_argument("--memory-gb", type=float, nargs="+", metavar="GB", help="memory of each device (default: "
                        "its kind's)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (default: 1)")
    parser.add_argument("--seq", type=int, default=4096, metavar="S", help="tokens of each sequence (default: 4096)")
    add_options(parser, EngineOptions, ("dtype", "fp8_enabled"))
    parser.add_argument("--objective", default="latency", choices=("latency", "throughput"), help="figure that plans "
                        "are ranked by (default: latency)")
    parser.add_argument("--json", action="store_true", help="one JSON object per plan")
    parser.add_argument("--xla-flags", action="store_true", help="only the flags that XLA_FLAGS should have on such "
                        "devices")
