"""Measure the time and memory of converting a checkpoint, against copying and hashing the same files.

    python scripts/bench/convert.py [--preset qwen2.5-1.5b] [--layers N] [--shards 4] [--rounds 3] [--folder DIR]

Makes a bfloat16 checkpoint with random weights, then alternates the baseline (`cp --reflink=never`, fsync,
`sha256sum`) with conversion, each from a fresh process and with the source in the page cache. Peak memory is the
converting process's own high-water mark, imports included. A second baseline hashes with OpenSSL, which uses SHA
instructions where `sha256sum` may not. Needs about three times the checkpoint's size on disk; deletes what it made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen_jax.checkpoint.hf_layout import hf_shapes
from qwen_jax.checkpoint.safetensors_io import SafetensorsWriter
from qwen_jax.config import ModelConfig

MEMORY_SLACK, TIME_FACTOR = 600e6, 1.5  # the bars: 2 x the largest tensor + 600 MB, and 1.5 x the baseline

CHILD = """
import sys, time
start = time.perf_counter()
from qwen_jax import checkpoint
imported = time.perf_counter()
work, src, dst = sys.argv[1:]
if work == "load":
    source = checkpoint.resolve(src)
    params = checkpoint.load_params(source, source.config)
else:
    getattr(checkpoint, work)(src, dst)
done = time.perf_counter()
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(imported - start, done - imported, peak)
"""


def make_checkpoint(folder: Path, config: ModelConfig, shards: int) -> int:
    """Write a checkpoint of random finite bfloat16 weights and return the size of its largest tensor in bytes."""
    shapes = hf_shapes(config)
    dtype = np.dtype(ml_dtypes.bfloat16)
    total = sum(int(np.prod(shape)) for shape in shapes.values()) * 2
    largest = max(int(np.prod(shape)) for shape in shapes.values()) * 2
    # A shard is closed before the tensor that would overflow it, so the limit leaves room for half of the largest.
    limit = total // shards + largest // 2
    folder.mkdir()
    writer = SafetensorsWriter(folder, {name: (dtype, shape) for name, shape in shapes.items()}, limit)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        bits = rng.integers(0, 1 << 16, size=shape, dtype=np.uint16) & 0xBFFF  # top exponent bit off: finite
        writer.write(name, bits.view(dtype))
    writer.close()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    os.sync()
    return largest


def copy_and_hash(src: Path, dst: Path, openssl: bool = False) -> float:
    """Copy a checkpoint's files with `cp`, fsync the copies, and hash the files with SHA-256; return the seconds."""
    files = sorted(src.iterdir())
    start = time.perf_counter()
    dst.mkdir()
    subprocess.run(["cp", "--reflink=never", *files, dst], check=True)
    for file in dst.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    if openssl:
        for file in files:
            with open(file, "rb") as opened:
                hashlib.file_digest(opened, "sha256")
    else:
        subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def run(work: str, src: Path, dst: Path) -> tuple[float, int]:
    """Run `work` ("convert", "export" or "load") on a checkpoint in a fresh process; return seconds and peak memory."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, work, str(src), str(dst)], check=True, stdout=subprocess.PIPE,
                          text=True)
    seconds = time.perf_counter() - start
    return seconds, int(done.stdout.split()[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset, for a quick look")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    if args.layers:
        config = replace(config, num_layers=args.layers)
    work = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=args.folder))
    try:
        src, dst = work / "hf", work / "out"
        print("writing a random checkpoint ...", file=sys.stderr)
        largest = make_checkpoint(src, config, args.shards)
        size = sum(file.stat().st_size for file in src.glob("*.safetensors"))
        print(f"{args.preset}, {config.num_layers} layers: {size / 1e9:.2f} GB in "
              f"{len(list(src.glob('*.safetensors')))} shards, largest tensor {largest / 1e6:.0f} MB, "
              f"load average {os.getloadavg()[0]:.1f}")
        seconds: dict[str, list[float]] = {"cp + fsync + sha256sum": [], "cp + fsync + OpenSSL": [], "convert": []}
        peaks = []
        for index in range(args.rounds):
            print(f"round {index + 1} of {args.rounds} ...", file=sys.stderr)
            for name, openssl in (("cp + fsync + sha256sum", False), ("cp + fsync + OpenSSL", True)):
                seconds[name].append(copy_and_hash(src, dst, openssl))
                shutil.rmtree(dst)
            elapsed, peak = run("convert", src, dst)
            seconds["convert"].append(elapsed)
            peaks.append(peak)
            if index < args.rounds - 1:
                shutil.rmtree(dst)
        export_seconds, export_peak = run("export", dst, work / "back")
        load_seconds, load_peak = run("load", dst, work)
        base = statistics.median(seconds["cp + fsync + sha256sum"])
        ratio = statistics.median(seconds["convert"]) / base
        print(f"{'':24} {'median s':>9} {'all':>24} {'x base':>7} {'peak MB':>8}")
        for name, values in seconds.items():
            peak = f"{max(peaks) / 1e6:8.0f}" if name == "convert" else ""
            runs = " ".join(f"{v:.1f}" for v in values)
            median = statistics.median(values)
            print(f"{name:24} {median:9.2f} {runs:>24} {median / base:7.2f} {peak}")
        print(f"{'export':24} {export_seconds:9.2f} {'':>24} {export_seconds / base:7.2f} {export_peak / 1e6:8.0f}")
        print(f"{'load':24} {load_seconds:9.2f} {'':>24} {load_seconds / base:7.2f} {load_peak / 1e6:8.0f}")
        allowed = 2 * largest + MEMORY_SLACK
        print(f"time   {ratio:.2f} x of at most {TIME_FACTOR} x: {'ok' if ratio <= TIME_FACTOR else 'MISSED'}")
        print(f"memory {max(peaks) / 1e6:.0f} MB of at most {allowed / 1e6:.0f} MB: "
              f"{'ok' if max(peaks) <= allowed else 'MISSED'}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
