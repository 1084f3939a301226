"""Convert a model, load it, screen a file of card transactions, stream an answer, and print time and memory.

    python scripts/demo.py [--model bundled] [--count 64] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from qwen_jax.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="HF folder, hub id, or 'bundled'")
    parser.add_argument("--count", type=int, default=64, help="transactions to screen")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder, removed at the end")
    args = parser.parse_args()
    try:
        if args.folder:
            args.folder.mkdir(parents=True, exist_ok=True)
            run(args.model, args.count, args.folder)
        else:
            with tempfile.TemporaryDirectory() as folder:
                run(args.model, args.count, Path(folder))
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def run(model: str, count: int, folder: Path) -> None:
    """Convert a model, load it, screen `count` transactions and stream an answer; print a table of times and memory."""
    from qwen_jax import Engine, SamplingParams, convert
    from qwen_jax.evaluation.fraud.score import score
    from qwen_jax.evaluation.fraud.task import generate, write_jsonl

    say(f"1. converting {model} to an Orbax checkpoint")
    began = time.perf_counter()
    checkpoint = convert(model, folder / "checkpoint")
    say(f"   {sum(f.stat().st_size for f in checkpoint.rglob('*') if f.is_file()) / 1e6:.1f} MB in "
        f"{time.perf_counter() - began:.1f} s: {checkpoint}")

    say("2. loading it into an engine")
    engine = Engine.from_pretrained(checkpoint, dtype="float32" if model == "bundled" else "bfloat16",
                                    max_seq_len=1024)
    say(f"   ready in {engine.stats().warmup_seconds:.1f} s: {engine.stats().executables} executables")

    transactions = folder / "transactions.jsonl"
    write_jsonl(transactions, generate(seed=2, split="heldout", count=count))
    examples = [json.loads(line) for line in transactions.read_text().splitlines()]
    say(f"3. screening {len(examples)} transactions from {transactions}")
    params = SamplingParams(max_tokens=24, temperature=0.0)
    began = time.perf_counter()
    outputs = engine.chat([example["messages"] for example in examples], params)
    seconds = time.perf_counter() - began
    for example, output in list(zip(examples, outputs, strict=True))[:4]:
        payment = example["messages"][-1]["content"].splitlines()[-1]
        say(f"   {payment[:72]}...\n      -> {output.text!r} ({output.schedule}); right: {example['answer']!r}")
    say(f"   {len(examples) / seconds:.1f} transactions/s")

    say("4. streaming an answer")
    sys.stdout.write("   ")
    for delta in engine.stream(examples[0]["messages"], params):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    print()

    report(engine.stats(), score([output.text for output in outputs], generate(seed=2, split="heldout", count=count)))


def report(stats, result) -> None:
    """Print the steps of each bucket (compiled batch shape), the executables, the peak memory, and the accuracy."""
    print(f"\n{'bucket':34} {'steps':>6} {'rows':>6} {'tokens':>7} {'tokens/s':>9} {'prepare s':>10}")
    for bucket in stats.buckets:
        if bucket.steps:
            print(f"{bucket.bucket:34} {bucket.steps:6} {bucket.rows:6} {bucket.tokens:7} "
                  f"{bucket.tokens / bucket.seconds:9.0f} {bucket.prepare_seconds:10.2f}")
    compiling = sum(bucket.prepare_seconds for bucket in stats.buckets if not bucket.from_disk)
    loading = sum(bucket.prepare_seconds for bucket in stats.buckets if bucket.from_disk)
    print(f"\nexecutables                {stats.executables} ({compiling:.1f} s compiling, {loading:.1f} s from disk)")
    print(f"compiles after warm-up     {stats.compiles_after_warmup}")
    print(f"peak memory                {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    print(f"accuracy on the file       {result.accuracy:.3f} (always the commoner label: {result.majority:.3f})")
    print(result.table())


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
