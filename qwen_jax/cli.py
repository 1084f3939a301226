"""The command line: one thin function per subcommand.

Results go to stdout, progress and logs to stderr. A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence

from qwen_jax.cli_cluster import add_cluster
from qwen_jax.cli_serving import add_serving
from qwen_jax.cli_tune import add_tune
from qwen_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qwen-jax``; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's business
    try:
        code = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"qwen-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away: say nothing, also at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code or 0


def _convert(args: argparse.Namespace) -> None:
    from qwen_jax.checkpoint import convert

    print(convert(args.src, args.dst, dtype=args.dtype, fp8=args.fp8, processes=args.processes))


def _export(args: argparse.Namespace) -> None:
    from qwen_jax.checkpoint import export_as

    print(export_as(args.src, args.dst, args.format, args.dtype))


def _engine(args: argparse.Namespace, **options):
    from qwen_jax.engine.engine import Engine

    return Engine.from_pretrained(args.model, dtype=args.dtype,
                                  progress=sys.stderr.isatty() or not getattr(args, "json", False), **options)


def _sampling(args: argparse.Namespace):
    from qwen_jax.engine.api.sampling_params import SamplingParams

    return SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)


def _generate(args: argparse.Namespace) -> None:
    params = _sampling(args)  # refused before a model is loaded
    engine = _engine(args, max_batch_size=1, max_seq_len=args.max_seq_len)
    if args.json:
        output = engine.generate(args.prompt, params)[0]
        kept = ("text", "token_ids", "finish_reason", "schedule")
        print(json.dumps({name: getattr(output, name) for name in kept}))
        return
    for delta in engine.stream(args.prompt, params):
        print(delta.text, end="", flush=True)
    print()


def _chat(args: argparse.Namespace) -> None:
    params = _sampling(args)
    engine = _engine(args, max_batch_size=1, max_seq_len=args.max_seq_len)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        for delta in engine.stream(messages, params):
            answer += delta.text
            print(delta.text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


def _train(args: argparse.Namespace) -> None:
    from qwen_jax.training.finetune import train
    from qwen_jax.training.recipe import load_recipe

    print(train(load_recipe(args.recipe)))


def _eval(args: argparse.Namespace) -> None:
    from qwen_jax.evaluation.longcontext.report import heat_map, table
    from qwen_jax.evaluation.longcontext.samples import FAMILIES
    from qwen_jax.evaluation.longcontext.suite import check, evaluate

    try:
        lengths = sorted({int(length) for length in args.lengths.split(",")})
    except ValueError:
        raise UserError(f"--lengths takes numbers of tokens, such as 4096,8192, not {args.lengths!r}") from None
    for option in ("picture", "recall"):
        if (name := getattr(args, option)) and not name.endswith(".png"):
            raise UserError(f"--{option} writes a PNG: name a file that ends in .png, not {name}")
    families = args.families.split(",") if args.families else tuple(FAMILIES)
    check(lengths, families, args.samples)
    options = {} if args.selector is None else _attention(args)
    engine = _engine(args, max_seq_len=lengths[-1], max_batch_size=args.batch_size, **options)
    if engine.tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer, and the tasks are text")
    cells = []
    for cell in evaluate(_answers(engine), engine.tokenizer, lengths, families, args.samples, args.seed):
        cells.append(cell)
        low, high = cell.interval
        if args.json:
            print(json.dumps({**dataclasses.asdict(cell), "accuracy": cell.accuracy, "low": low, "high": high}),
                  flush=True)
        print(f"{cell.family} at {cell.length:,}: {cell.right} of {cell.samples} right", file=sys.stderr)
    if not args.json:
        print(table(cells))
    if args.picture:
        heat_map(cells, args.picture, f"long context, {args.model}")
        print(args.picture, file=sys.stderr)
    if args.recall:
        _recall(args, lengths)


def _recall(args: argparse.Namespace, lengths: list[int]) -> None:
    """A picture of what every selector finds, on the texts that calibration uses."""
    from qwen_kernels.sparse_attention import SELECTORS

    from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
    from qwen_jax.evaluation.calibrate_sparsity import default_texts
    from qwen_jax.evaluation.compare_selectors import compare, picture

    source = resolve(args.model)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    points = [point for length in lengths for point in compare(
        model, default_texts(tokenizer, length, args.seed), list(SELECTORS),
        progress=_say)]
    picture(points, args.recall, f"selectors on {args.model}")
    print(args.recall, file=sys.stderr)


def _attention(args: argparse.Namespace) -> dict:
    """An engine's options for long prompts attended to as --selector says."""
    from qwen_kernels.sparse_attention import SELECTORS, Sparsity

    from qwen_jax.checkpoint import read_sparsity, resolve
    from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy

    if args.selector not in ("dense", *SELECTORS):
        raise UserError(f"--selector is one of dense, {', '.join(SELECTORS)}, not {args.selector}")
    if args.selector == "dense":
        return {"policy": SchedulePolicy(sparse_above_tokens=1 << 30)}
    source = resolve(args.model)
    config = source.config
    stored = read_sparsity(source.path, config) or (Sparsity(),) * config.num_layers
    return {"sparsity": [dataclasses.replace(one, selector=args.selector) for one in stored]}


def _calibrate(args: argparse.Namespace) -> None:
    from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
    from qwen_jax.evaluation.calibrate_sparsity import default_texts
    from qwen_jax.training.examples import read_examples

    source = resolve(args.model)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer, and the texts to calibrate with are text")
    if args.data:
        texts = [example.tokens for example in read_examples([args.data], tokenizer, args.length, "skip")]
    else:
        texts = default_texts(tokenizer, args.length)
    (_calibrate_eight_bit if args.fp8 else _calibrate_sparsity)(args, source, load_model(source, "float32"), texts)


def _calibrate_sparsity(args: argparse.Namespace, source, model, texts) -> None:
    from qwen_kernels.sparse_attention import Sparsity

    from qwen_jax.checkpoint import write_sparsity
    from qwen_jax.evaluation.calibrate_sparsity import calibrate

    found = calibrate(model, texts, Sparsity(budget=args.budget), _say)
    measured = {"tokens": args.length, "density": float(found.after.density),
                "divergence": float(found.after.divergence),
                "divergence_before": float(found.before.divergence)}
    path = write_sparsity(args.output or source.path, found.layers, measured)
    dense = sum(len(layer.dense_heads) for layer in found.layers)
    print(f"{dense} of {source.config.num_layers * source.config.num_kv_heads} heads dense, budgets "
          f"{', '.join(f'{layer.budget:g}' for layer in found.layers)}: density {found.after.density:.3f}, divergence "
          f"{found.before.divergence:.4f} to {found.after.divergence:.4f} nats: {path}")


def _calibrate_eight_bit(args: argparse.Namespace, source, model, texts) -> None:
    from qwen_jax.checkpoint import write_calibrated
    from qwen_jax.evaluation.calibrate_precision import calibrate_eight_bit

    result = calibrate_eight_bit(model, texts, _say)
    precision = result.found.precision
    path = write_calibrated(args.output or source.path, result.found, {
        "tokens": sum(map(len, texts)), "divergence": result.divergence, "loss": result.loss,
        "loss_in_full_precision": result.full_loss})
    pages = ", ".join(f"{count} {kind}" for kind, count in Counter(precision.kv_cache).items())
    print(f"8-bit matrices in {sum(precision.weights)} of {source.config.num_layers} layers, embedding and head "
          f"{'8-bit' if precision.tables else '16-bit'}, pages of layers: {pages}; divergence {result.divergence:.4f} "
          f"nats, loss {result.loss - result.full_loss:+.4f} nats: {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _answers(engine):
    """Greedy answers of an engine to prompts of token ids."""
    from qwen_jax.engine.api.sampling_params import SamplingParams

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[str]:
        params = [SamplingParams(max_tokens=most, temperature=0.0, repetition_penalty=1.0) for most in max_tokens]
        return [output.text for output in engine.generate(prompts, params)]

    return generate


def _info(args: argparse.Namespace) -> None:
    if args.buckets:
        _buckets(args, _compiled(args, ...))
        return
    facts = _memory(args) if args.memory else _facts(args.model)
    if args.json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):{width}}  {value:,}" if isinstance(value, int) and not isinstance(value, bool)
              else f"{name.replace('_', ' '):{width}}  {value}")


def _plan(args: argparse.Namespace) -> None:
    from qwen_jax.checkpoint.source import find_config
    from qwen_jax.parallel.hardware import hardware
    from qwen_jax.parallel.planner import Request, plans, same_memory
    from qwen_jax.parallel.report import as_rows, as_text
    from qwen_jax.quantization import default_precision

    if args.xla_flags:
        print(*hardware(args.device).xla_flags)
        return
    config, _ = find_config(args.model)
    memory = same_memory(args.memory_gb) if args.memory_gb else None
    precision = default_precision(config, True, "e4m3") if args.fp8 else None
    report = plans(Request(config, hardware(args.device), args.devices, args.batch, args.seq, args.dtype, precision,
                           memory), args.objective)
    if args.json:
        for row in as_rows(report):
            print(json.dumps(row))
    else:
        print(as_text(report))


def _compile(args: argparse.Namespace) -> None:
    engine = _compiled(args, args.output)
    print(f"{len(engine.runner.executables.programs)} executables in {args.output}")


def _compiled(args: argparse.Namespace, cache_dir):
    """An engine without weights whose programs are compiled and kept in a folder."""
    from qwen_jax.engine.engine import Engine

    options = {name: getattr(args, name) for name in ("max_batch_size", "max_seq_len", "kv_cache_bytes")
               if getattr(args, name) is not None}
    engine = Engine.without_weights(args.model, dtype=args.dtype, cache_dir=cache_dir, **options)
    engine.runner.compile(progress=sys.stderr.isatty() or not getattr(args, "json", False))
    return engine


def _buckets(args: argparse.Namespace, engine) -> None:
    """What each bucket costs, as XLA sees it."""
    rows = []
    for bucket in engine.runner.table:
        program, = engine.runner.programs(bucket)
        rows.append({"bucket": str(bucket), "gflops": program.flops / 1e9, "accessed_mb": program.bytes_accessed / 1e6,
                     "temporary_mb": program.temp_bytes / 1e6, "seconds": program.seconds,
                     "from_disk": program.from_disk})
    if args.json:
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


def _memory(args: argparse.Namespace) -> dict:
    """What --memory says: bytes in 16 bits, or with --fp8, from the configuration alone."""
    from qwen_jax.checkpoint.source import find_config
    from qwen_jax.engine.config.engine_config import precision_of
    from qwen_jax.engine.config.memory import memory_report

    if not args.memory_gb > 0:
        raise UserError(f"--memory-gb is the device's memory in GB, a positive number, not {args.memory_gb:g}")
    config, where = find_config(args.model)
    precision = precision_of(config, args.fp8, "auto")
    return {"model": where, "fp8": args.fp8} | memory_report(config, "bfloat16", precision, int(args.memory_gb * 1e9))


def _facts(ref: str) -> dict:
    """What ``info`` says of a model or a preset. Reads the configuration only."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen-jax", description="Qwen2.5 in JAX. MODEL is a Hugging Face folder, a "
                                     "converted checkpoint, a hub id, 'bundled' or 'yardstick'.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    convert = command("convert", _convert, "Convert a Hugging Face model to a new Orbax checkpoint.")
    convert.add_argument("src")
    convert.add_argument("dst")
    convert.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: keep every tensor bit for bit")
    convert.add_argument("--fp8", action="store_true", help="e4m3 weights in all layers but the first and the last")
    convert.add_argument("--processes", type=int, default=1, metavar="N", help="of this machine, which share the work")

    export = command("export", _export, "Write a model for other programs: a converted checkpoint as a Hugging Face "
                     "folder; any model as GGUF for llama.cpp, or as StableHLO.")
    export.add_argument("src")
    export.add_argument("dst")
    export.add_argument("--format", choices=["hf", "gguf", "stablehlo"], default="hf")
    export.add_argument("--dtype", help="gguf: float16 (default), bfloat16, q8_0; stablehlo: bfloat16 (default), "
                        "float16, float32")

    generate = command("generate", _generate, "Continue a prompt.")
    generate.add_argument("model")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--json", action="store_true", help="one JSON object on stdout")
    chat = command("chat", _chat, "Talk to a model: one line per turn, Ctrl-D ends.")
    chat.add_argument("model")
    chat.add_argument("--system", help="system message")
    for sub in (generate, chat):
        sub.add_argument("--max-tokens", type=int)
        sub.add_argument("--temperature", type=float, help="0 is greedy; default: the checkpoint's")
        sub.add_argument("--top-p", type=float)
        sub.add_argument("--seed", type=int)
        sub.add_argument("--max-seq-len", type=int, help="default: 4096 or the model's context if shorter")

    add_serving(commands, command)
    add_tune(commands, command)
    add_cluster(commands)

    evaluation = command("eval", _eval, "Score a model on a suite of tasks with exact answers.")
    evaluation.add_argument("model")
    evaluation.add_argument("--suite", choices=["longcontext"], default="longcontext")
    evaluation.add_argument("--lengths", default="4096", help="tokens of prompt and answer, such as 4096,8192")
    evaluation.add_argument("--families", help="comma-separated; default: all")
    evaluation.add_argument("--samples", type=int, default=50, help="of each family at each length; default 50")
    evaluation.add_argument("--seed", type=int, default=0)
    evaluation.add_argument("--batch-size", type=int, default=8, help="prompts worked on at once; default 8")
    evaluation.add_argument("--picture", metavar="FILE.png", help="write a heat map")
    evaluation.add_argument("--selector", help="attention of long prompts: dense (full attention), pyramid (the "
                            "default), quest, strided, ...")
    evaluation.add_argument("--recall", metavar="FILE.png", help="draw how much of full attention every selector "
                            "finds, by density")
    evaluation.add_argument("--json", action="store_true", help="one JSON object per family and length")
    for sub in (generate, chat, evaluation):
        sub.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")

    calibration = command("calibrate", _calibrate, "Find how sparse a model's attention may be, or what of it may be "
                          "8-bit, and keep it beside its weights, where the engine looks.")
    calibration.add_argument("model")
    calibration.add_argument("--fp8", action="store_true", help="what may be 8-bit: layers, types and ranges of pages")
    calibration.add_argument("--data", metavar="FILE", help="JSONL as for training, of texts that are like the model's "
                             "work; default: conversations of the long-context suite")
    calibration.add_argument("--length", type=int, default=4096, help="tokens of each text; default 4096")
    calibration.add_argument("--budget", type=float, default=2.0, help="pages by rank: budget * log2(pages); default 2")
    calibration.add_argument("-o", "--output", metavar="DIR", help="folder to write to; default: the model's own")

    train = command("train", _train, "Fine-tune a model, or train a LoRA adapter, as a TOML recipe says. Run again, it "
                    "continues where it was interrupted.")
    train.add_argument("recipe")

    info = command("info", _info, "Show a model's architecture and sizes, from its configuration alone.")
    info.add_argument("model", help="MODEL or a preset such as qwen2.5-7b")
    info.add_argument("--json", action="store_true", help="one JSON object on stdout; with --buckets, one per bucket")
    info.add_argument("--buckets", action="store_true", help="compile every program of an engine and say what it costs")
    info.add_argument("--memory", action="store_true", help="what weights and KV cache take, and what fits on a device")
    info.add_argument("--fp8", action="store_true", help="with --memory: e4m3 weights and KV cache")
    info.add_argument("--memory-gb", type=float, default=80, metavar="GB", help="of the device (default 80)")
    build = command("compile", _compile, "Compile an engine's programs ahead of its deployment, without its weights. "
                    "The engine finds them with cache_dir=DIR and the same sizes, on the same kind of device.")
    build.add_argument("model", help="MODEL or a preset such as qwen2.5-7b")
    build.add_argument("-o", "--output", metavar="DIR", required=True)
    plan = command("plan", _plan, "Say how a model can be divided over several devices, and what each way costs.")
    plan.add_argument("model", help="MODEL or a preset such as qwen2.5-72b")
    plan.add_argument("--devices", type=int, required=True, metavar="N")
    plan.add_argument("--device", default="h100", help="its kind: a10, a100, a100-40, h100, h200, cpu (default h100)")
    plan.add_argument("--memory-gb", type=float, nargs="+", metavar="GB", help="of each device (default: its kind's)")
    plan.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (default 1)")
    plan.add_argument("--seq", type=int, default=4096, metavar="S", help="their tokens (default 4096)")
    plan.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    plan.add_argument("--fp8", action="store_true", help="e4m3 weights and KV cache")
    plan.add_argument("--objective", default="latency", choices=("latency", "throughput"), help="what to rank by")
    plan.add_argument("--json", action="store_true", help="one JSON object per plan")
    plan.add_argument("--xla-flags", action="store_true", help="print only what XLA_FLAGS should have on such devices")
    for sub in (info, build):
        sub.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the engine")
        sub.add_argument("--max-batch-size", type=int)
        sub.add_argument("--max-seq-len", type=int)
        sub.add_argument("--kv-cache-bytes", type=int, help="a shape of the programs; by default from what is free")
    return parser


if __name__ == "__main__":
    sys.exit(main())
