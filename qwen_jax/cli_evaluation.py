"""Subcommands ``eval``, which scores a model on tasks, and ``calibrate``, which finds sparse and 8-bit settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.cli_options import add_command, add_model, add_options
from qwen_jax.errors import UserError
from qwen_jax.serving.options import EngineOptions

SELECTED_ABOVE = 1024  # tokens: longer prompts use the selector that `eval --selector` names


def evaluate(args: argparse.Namespace) -> None:
    from qwen_jax.engine.engine import Engine
    from qwen_jax.evaluation.longcontext.report import heat_map, table
    from qwen_jax.evaluation.longcontext.samples import FAMILIES
    from qwen_jax.evaluation.longcontext.suite import check, evaluate

    lengths = _lengths(args.lengths)
    for option in ("picture", "recall"):
        if (name := getattr(args, option)) and not name.endswith(".png"):
            raise UserError(f"--{option} must be a PNG file, whose name ends in .png, not {name}")
    families = args.families.split(",") if args.families else tuple(FAMILIES)
    check(lengths, families, args.samples)
    engine = Engine.from_pretrained(args.model, dtype=args.dtype, max_seq_len=lengths[-1],
                                    max_batch_size=args.batch_size, progress=sys.stderr.isatty() or not args.json,
                                    **({} if args.selector is None else _attention(args.model, args.selector)))
    if engine.tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer, and the tasks are text")
    cells = []
    for cell in evaluate(_greedy(engine), engine.tokenizer, lengths, families, samples=args.samples, seed=args.seed,
                         batch_size=args.batch_size):
        cells.append(cell)
        low, high = cell.interval
        if args.json:
            print(json.dumps({**dataclasses.asdict(cell), "accuracy": cell.accuracy, "low": low, "high": high}),
                  flush=True)
        _say(f"{cell.family} at {cell.length:,}: {cell.right} of {cell.samples} right")
    if not args.json:
        print(table(cells))
    if args.picture:
        heat_map(cells, args.picture, f"long context, {args.model}")
        _say(args.picture)
    if args.recall:
        _draw_recall(args, lengths)


def _lengths(text: str) -> list[int]:
    """Parse the value of ``--lengths``, such as ``4096,8192``, into numbers of tokens, ascending and distinct."""
    try:
        return sorted({int(length) for length in text.split(",")})
    except ValueError:
        raise UserError(f"--lengths must be numbers of tokens, such as 4096,8192, not {text!r}") from None


def _draw_recall(args: argparse.Namespace, lengths: list[int]) -> None:
    """Draw the picture of ``--recall``: the share of full attention that sparse attention finds with each selector.

    A selector chooses the KV-cache pages that a query reads. The texts are those that calibration uses.
    """
    from qwen_kernels.sparse_attention import SELECTORS

    from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
    from qwen_jax.evaluation.calibrate_sparsity import default_texts
    from qwen_jax.evaluation.compare_selectors import compare, picture

    source = resolve(args.model)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    points = [point for length in lengths for point in compare(
        model, default_texts(tokenizer, length, args.seed), list(SELECTORS), progress=_say)]
    picture(points, args.recall, f"selectors on {args.model}")
    _say(args.recall)


def _attention(model: str, selector: str) -> dict[str, Any]:
    """Return keywords of `Engine` that set the attention of long prompts.

    ``selector`` names the method that chooses the KV-cache pages to read; "dense" reads all of them.
    """
    from qwen_kernels.sparse_attention import SELECTORS, Sparsity

    from qwen_jax.checkpoint import read_sparsity, resolve
    from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy

    if selector not in ("dense", *SELECTORS):
        raise UserError(f"--selector must be one of dense, {', '.join(SELECTORS)}, not {selector}")
    if selector == "dense":
        return {"policy": SchedulePolicy(sparse_above_tokens=1 << 30)}
    source = resolve(model)
    layers = read_sparsity(source, source.config) or (Sparsity(),) * source.config.num_layers
    return {"sparsity": [dataclasses.replace(layer, selector=selector) for layer in layers],
            "policy": SchedulePolicy(sparse_above_tokens=SELECTED_ABOVE)}


def _greedy(engine: Any) -> Callable[[list[list[int]], list[int]], list[str]]:
    """Return a function that generates greedy answers to prompts (token ids), each with its largest token count."""
    from qwen_jax.engine.api.sampling_params import SamplingParams

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[str]:
        params = [SamplingParams(max_tokens=limit, temperature=0.0, repetition_penalty=1.0) for limit in max_tokens]
        return [output.text for output in engine.generate(prompts, params)]

    return generate


def calibrate(args: argparse.Namespace) -> None:
    import jax

    from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
    from qwen_jax.checkpoint.source import EIGHT_BIT, SPARSITY
    from qwen_jax.evaluation.calibrate_sparsity import default_texts
    from qwen_jax.evaluation.measured import Measured
    from qwen_jax.training.examples import read_examples

    source, length = resolve(args.model), args.length or (2048 if args.fp8 else 4096)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer, and the texts to calibrate with are text")
    if args.data:
        texts = [example.tokens for example in read_examples([args.data], tokenizer, length, skip_bad=True)]
    else:
        texts = default_texts(tokenizer, length, count=args.texts)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)  # a CPU computes slowly in bfloat16
    model, folder = load_model(source, dtype), Path(args.output or source.path)
    kind = EIGHT_BIT if args.fp8 else SPARSITY
    measured = Measured(folder / f".{kind}.partial", _subject(model, texts, args), _say)
    (_calibrate_eight_bit if args.fp8 else _calibrate_sparsity)(args, model, texts, folder, measured)
    measured.finish()


def _subject(model: Any, texts: list[Any], args: argparse.Namespace) -> list[Any]:
    """Return what a calibration measures, as JSON: digests of weights and texts, and the settings."""
    import hashlib

    import numpy as np

    weights = hashlib.sha256(np.asarray(model.norm.scale[...]).tobytes())
    for layer in model.layers:
        weights.update(np.asarray(layer.attention.wqkv[...][0, 0]).tobytes())
    return [weights.hexdigest(), hashlib.sha256(repr(texts).encode()).hexdigest(), str(model.dtype), args.budget]


def _calibrate_sparsity(args: argparse.Namespace, model: Any, texts: list[Any], folder: Path, measured: Any) -> None:
    from qwen_kernels.sparse_attention import Sparsity

    from qwen_jax.checkpoint import write_sparsity
    from qwen_jax.evaluation.calibrate_sparsity import calibrate

    # Estimates alone take less time than the default's ranks by keys; where they fail, heads are left dense.
    result = calibrate(model, texts, Sparsity("pyramid", budget=args.budget), measured)
    path = write_sparsity(folder, result.layers, {
        "tokens": sum(map(len, texts)), "density": result.after.density, "divergence": result.after.divergence,
        "divergence_before": result.before.divergence})
    dense = sum(len(layer.dense_heads) for layer in result.layers)
    print(f"{dense} of {model.config.num_layers * model.config.num_kv_heads} heads dense, budgets "
          f"{', '.join(f'{layer.budget:g}' for layer in result.layers)}: density {result.after.density:.3f}, "
          f"divergence {result.before.divergence:.4f} to {result.after.divergence:.4f} nats: {path}")


def _calibrate_eight_bit(args: argparse.Namespace, model: Any, texts: list[Any], folder: Path, measured: Any) -> None:
    from qwen_jax.checkpoint import write_calibrated
    from qwen_jax.evaluation.calibrate_precision import calibrate_eight_bit

    result = calibrate_eight_bit(model, texts, measured)
    precision = result.found.precision
    path = write_calibrated(folder, result.found, {
        "tokens": sum(map(len, texts)), "divergence": result.divergence, "loss": result.loss,
        "loss_in_full_precision": result.full_loss})
    pages = ", ".join(f"{count} {kind}" for kind, count in Counter(precision.kv_cache).items())
    print(f"8-bit matrices in {sum(precision.weights)} of {model.config.num_layers} layers, embedding and head "
          f"{'8-bit' if precision.tables else '16-bit'}, pages of layers: {pages}; divergence {result.divergence:.4f} "
          f"nats, loss {result.loss - result.full_loss:+.4f} nats: {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def add_eval(commands: Any) -> None:
    parser = add_command(commands, "eval", evaluate, "Score a model on a suite of tasks with exact answers.")
    add_model(parser)
    parser.add_argument("--suite", choices=["longcontext"], default="longcontext", help="tasks (default: longcontext)")
    parser.add_argument("--lengths", default="4096", metavar="N[,N...]", help="tokens of prompt and answer, such as "
                        "4096,8192 (default: 4096)")
    parser.add_argument("--families", metavar="NAME[,NAME...]", help="families of tasks (default: all)")
    parser.add_argument("--samples", type=int, default=50, metavar="N", help="samples of each family at each length "
                        "(default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: 8)")
    parser.add_argument("--picture", metavar="FILE.png", help="heat map of the scores")
    parser.add_argument("--selector", help="attention of prompts of more than 1,024 tokens: dense (full attention), "
                        "pyramid, quest, strided, ... (default: the engine's, sparse above 8,192 tokens)")
    parser.add_argument("--recall", metavar="FILE.png", help="picture of how much of full attention every selector "
                        "finds, by density")
    parser.add_argument("--json", action="store_true", help="one JSON object per family and length")
    add_options(parser, EngineOptions, ("dtype",))


def add_calibrate(commands: Any) -> None:
    parser = add_command(commands, "calibrate", calibrate, "Find how sparse a model's attention may be, or which parts "
                         "of it may be 8-bit, and keep that beside its weights, where the engine looks.")
    add_model(parser)
    parser.add_argument("--fp8", action="store_true", help="which parts may be 8-bit: layers, types and ranges of "
                        "pages")
    parser.add_argument("--data", metavar="FILE", help="JSONL as for training, with texts like those of the model's "
                        "work (default: conversations of the long-context suite)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each text (default: 4096, with --fp8 2048)")
    parser.add_argument("--texts", type=int, default=3, metavar="N", choices=range(1, 7),
                        help="conversations of the suite, 1 to 6 (default: 3)")
    parser.add_argument("--budget", type=float, default=3.0, metavar="X", help="pages by rank: X * log2(pages) "
                        "(default: 3)")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write to (default: the model's own)")
    add_options(parser, EngineOptions, ("dtype",))
