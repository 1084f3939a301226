"""Run the GPU tests and benchmarks of `gpu_check.sh` and write their results as JSON and Markdown.

With --rehearse the script runs at toy sizes on the CPU with other kernels, which tests the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 540  # time limit of the whole script


@dataclass(frozen=True)
class Sizes:
    """Sizes of the arrays that are measured, and the number of rounds; the defaults are attention of the 7B shape."""

    kv_heads: int = 4
    group: int = 7
    dim: int = 128
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072, 262144)
    decode_rows: tuple[int, ...] = (8, 32, 64)
    decode_context: int = 32768
    matrix: int = 8192
    copied: int = 1 << 32  # bytes
    rounds: int = 5


TOY = Sizes(kv_heads=1, group=2, dim=64, lengths=(512, 1024), decode_rows=(2,), decode_context=512, matrix=256,
            copied=1 << 20, rounds=2)


GPU_TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_gpu_eight_bit.py", "tests/quantization/test_fp8.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    if args.rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if not args.rehearse and jax.default_backend() != "gpu":
        print(f"jax sees no GPU here, only {jax.devices()}", file=sys.stderr)
        return 2
    sizes = TOY if args.rehearse else Sizes()
    report, folder = {"facts": facts(args.rehearse)}, Path(os.environ.get("OUT", "out"))
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable] = {"tests": tests, "ceilings": ceilings, "dense prefill": dense_prefill,
                                  "sparse prefill": sparse_prefill, "decode": decode, "tuning": tuning}
    for name, part in parts.items():
        left = SECONDS - (time.monotonic() - began)
        print(f"{name} ({left:.0f} s left)", file=sys.stderr)
        rows = report[name] = []
        try:
            for row in part(sizes, args.rehearse, report, lambda: SECONDS - (time.monotonic() - began)):
                rows.append(row)
                print("   ", row, file=sys.stderr)
                if time.monotonic() - began > SECONDS:
                    rows.append({"stopped": "no time left"})
                    break
        except Exception as error:  # earlier measurements stay valid
            rows.append({"error": f"{type(error).__name__}: {error}"[:2000]})
            print("   ", rows[-1], file=sys.stderr)
        (folder / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "gpu_check.md").write_text(markdown(report))
    print(markdown(report))
    return int(any("error" in row or row.get("failed") for rows in list(report.values())[1:] for row in rows))


def facts(rehearsal: bool) -> dict:
    """Return what the report begins with: date, device, commit, and versions of Python and jax."""
    import jax
    import jaxlib

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {"date": time.strftime("%Y-%m-%d"), "device": jax.devices()[0].device_kind, "commit": commit or "unknown",
            "python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__,
            "rehearsal": rehearsal}


def tests(sizes, rehearse, report, left):
    """Run the tests marked gpu in a subprocess; yield pytest's summary as a row of the report."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *GPU_TESTS, "-p", "no:cacheprovider"]
    env = os.environ | ({} if rehearse else {"JAX_PLATFORMS": "cuda,cpu"})
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=max(1, min(240, left() - 120)))
    yield {"summary": run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr[-500:],
           "failed": run.returncode not in (0, 5), "output": run.stdout[-4000:] if run.returncode else ""}


def ceilings(sizes, rehearse, report, left):
    """Measure the limits of the chip: bandwidth of a copy, and FLOP/s of a large bf16 product of random matrices."""
    import jax
    import jax.numpy as jnp

    source = jax.random.normal(jax.random.key(0), (sizes.copied // 4,), jnp.float32)
    took = seconds(jax.jit(lambda x: x + 1), (source,), sizes.rounds)
    yield {"what": "copy", "TB/s": 2 * sizes.copied / took / 1e12}
    a, b = (jax.random.normal(jax.random.key(i), (sizes.matrix, sizes.matrix), jnp.bfloat16) for i in range(2))
    took = seconds(jax.jit(jnp.matmul), (a, b), sizes.rounds)
    yield {"what": "bf16 product", "TFLOP/s": 2 * sizes.matrix**3 / took / 1e12}


def dense_prefill(sizes, rehearse, report, left):
    """Compare the time of the kernel's attention to all pages of a prompt with cuDNN's and torch's, by length."""
    for length in sizes.lengths:
        case = Prefill(sizes, length, rehearse)
        selection = case.everything()
        ours = seconds(case.kernel, (*case.arrays, selection), sizes.rounds)
        row = {"tokens": length, "ours ms": 1e3 * ours, "ours TFLOP/s": case.flops / ours / 1e12}
        row |= case.peers(sizes.rounds)
        row["cuDNN / ours"] = row["cuDNN ms"] / row["ours ms"]
        if length == sizes.lengths[0]:
            row["distance"] = case.distance(selection)
        yield row


def sparse_prefill(sizes, rehearse, report, left):
    """Compare the time of selecting pages and attending to them with cuDNN's full attention, by prompt length."""
    known = {row.get("tokens"): row.get("cuDNN ms") for row in report["dense prefill"]}
    for length in sizes.lengths:
        case = Prefill(sizes, length, rehearse)
        choose = seconds(case.choose, case.arrays, sizes.rounds)
        selection = case.choose(*case.arrays)
        attend = seconds(case.kernel, (*case.arrays, selection), sizes.rounds)
        full = known.get(length) or case.peers(sizes.rounds)["cuDNN ms"]
        row = {"tokens": length, "selection ms": 1e3 * choose, "attention ms": 1e3 * attend, "cuDNN full ms": full,
               "cuDNN full / ours": full / 1e3 / (choose + attend), "selection's share": choose / (choose + attend)}
        if length == sizes.lengths[0]:
            row["distance"] = case.distance(selection)
        yield row


def decode(sizes, rehearse, report, left):
    """Compare the bandwidth at which decode attention to all pages reads keys and values with that of a copy."""
    copy = next((row["TB/s"] for row in report["ceilings"] if row.get("what") == "copy"), None)
    for rows in sizes.decode_rows:
        run, arrays, nbytes = decode_case(sizes, rows, rehearse)
        took = seconds(run, arrays, sizes.rounds)
        reached = nbytes / took / 1e12
        yield {"rows": rows, "context": sizes.decode_context, "us": 1e6 * took, "TB/s": reached,
               "of a copy's": copy and reached / copy}


def tuning(sizes, rehearse, report, left):
    """Time the kernel with other tile counts, pipeline depths and splits: prefill of 16,384 tokens, and decode."""
    if rehearse:
        return
    from qwen_kernels.sparse_attention.mosaic_sm90 import Tuning

    case = Prefill(sizes, 16384, rehearse)
    for warpgroups, stages in ((1, 2), (1, 3), (2, 2), (2, 3), (3, 2)):
        try:
            took = seconds(case.tuned(Tuning(warpgroups, stages)), (*case.arrays, case.everything()), sizes.rounds)
            yield {"what": "prefill", "warpgroups": warpgroups, "stages": stages, "TFLOP/s": case.flops / took / 1e12}
        except Exception as error:  # a combination that does not fit is a result too
            yield {"what": "prefill", "warpgroups": warpgroups, "stages": stages, "refused": str(error)[:200]}
    for splits in (1, 2, 4, 8, 16, 32):
        run, arrays, nbytes = decode_case(sizes, sizes.decode_rows[0], rehearse, Tuning(splits=splits))
        took = seconds(run, arrays, sizes.rounds)
        yield {"what": "decode", "splits": splits, "TB/s": nbytes / took / 1e12}


class Prefill:
    """The attention of one layer in the prefill of a whole prompt, with keys and values on pages in random order."""

    def __init__(self, sizes: Sizes, length: int, rehearse: bool):
        import jax
        import jax.numpy as jnp
        from qwen_kernels.attention import PAGE
        from qwen_kernels.sparse_attention import Sparsity, new_summaries, select, update_summaries

        self.sizes, self.length, self.rehearse = sizes, length, rehearse
        pages = length // PAGE
        keys = jax.random.split(jax.random.key(length), 4)
        q = jax.random.normal(keys[0], (1, length, sizes.kv_heads, sizes.group, sizes.dim), jnp.bfloat16)
        k, v = (jax.random.normal(key, (pages + 1, sizes.kv_heads, PAGE, sizes.dim), jnp.bfloat16) for key in keys[1:3])
        table = jax.random.permutation(keys[3], jnp.arange(1, pages + 1))[None].astype(jnp.int32)
        start, whole = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
        self.arrays = q, k, v, table, start, whole
        self.flops = 2 * length * length * sizes.kv_heads * sizes.group * sizes.dim  # causal: half of all pairs
        stored = stored_on_cpu if rehearse else lambda x: x

        def choose(q, k, v, table, start, whole):
            k = stored(k)
            summaries = update_summaries(new_summaries(k, pages), k, table, start=start, length=whole, tokens=length)
            return select(q, k, summaries, table, start=start, length=whole, prompt_length=whole, sparsity=Sparsity())

        self.choose, self.kernel = jax.jit(choose), self.tuned()

    def tuned(self, *tuning):
        """Return the compiled attention kernel, with the given `Tuning` or the kernel's default."""
        import jax

        return jax.jit(lambda *arrays: kernel(self.rehearse)(*arrays, *tuning))

    def everything(self):
        """Return the selection with which each block of queries attends to all pages up to its own: dense attention."""
        import jax.numpy as jnp
        from qwen_kernels.sparse_attention import Selection

        blocks = self.arrays[3].shape[1]
        shape = 1, blocks, self.sizes.kv_heads
        count = jnp.broadcast_to(jnp.arange(1, blocks + 1, dtype=jnp.int32)[None, :, None], shape)
        return Selection(jnp.zeros((*shape, 1), jnp.int32), count, jnp.ones(shape, bool))

    def peers(self, rounds: int) -> dict:
        """Return the times in ms of cuDNN's and torch's full attention on the same prompt with its keys in order."""
        import jax

        q, k, v, table, *_ = self.arrays
        q = q.reshape(1, self.length, -1, self.sizes.dim)
        k, v = (x[table[0]].swapaxes(1, 2).reshape(1, self.length, -1, self.sizes.dim) for x in (k, v))
        run = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="xla" if self.rehearse else "cudnn"))
        times = {"cuDNN ms": 1e3 * seconds(run, (q, k, v), rounds)}
        try:
            times["torch ms"] = 1e3 * torch_seconds(self.sizes, self.length, rounds, self.rehearse)
        except Exception as error:  # torch is optional
            times["torch ms"] = None
            print(f"    torch: {error}", file=sys.stderr)
        return times

    def distance(self, selection) -> float:
        """Return the relative distance of the kernel's output from a reference that masks full attention in float32."""
        import jax
        import jax.numpy as jnp
        from qwen_kernels.sparse_attention import reference

        output = self.kernel(*self.arrays, selection).astype(jnp.float32)
        q, k, v, *rest = self.arrays
        expected = jax.jit(reference.attend)(*(x.astype(jnp.float32) for x in (q, k, v)), *rest, selection)
        return float(jnp.linalg.norm(output - expected) / jnp.linalg.norm(expected))


def decode_case(sizes: Sizes, rows: int, rehearse: bool, *tuning):
    """Return the compiled decode attention of `rows` sequences, its arrays, and the bytes of pages that it reads."""
    import jax
    import jax.numpy as jnp
    from qwen_kernels.attention import PAGE
    from qwen_kernels.sparse_attention import Selection

    width = sizes.decode_context // PAGE
    keys = jax.random.split(jax.random.key(rows), 4)
    q = jax.random.normal(keys[0], (rows, 1, sizes.kv_heads, sizes.group, sizes.dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (rows * width + 1, sizes.kv_heads, PAGE, sizes.dim), jnp.bfloat16)
            for key in keys[1:3])
    table = jax.random.permutation(keys[3], jnp.arange(1, rows * width + 1)).reshape(rows, width).astype(jnp.int32)
    length = jnp.full(rows, sizes.decode_context, jnp.int32)
    shape = rows, 1, sizes.kv_heads
    selection = Selection(jnp.zeros((*shape, 1), jnp.int32), jnp.full(shape, width, jnp.int32), jnp.ones(shape, bool))
    run = jax.jit(lambda *arrays: kernel(rehearse)(*arrays, *tuning))
    return run, (q, k, v, table, length - 1, length, selection), 2 * k[1:].nbytes


def kernel(rehearse: bool) -> Callable:
    """Return the Hopper kernel for attention to selected pages, or the XLA implementation in a rehearsal."""
    from qwen_kernels.sparse_attention import mosaic_sm90, xla

    def on_cpu(q, k, v, *rest):
        return xla.attend(q, stored_on_cpu(k), stored_on_cpu(v), *rest)

    return on_cpu if rehearse else mosaic_sm90.attend


def stored_on_cpu(pages):
    """Return pages of keys or values in the form in which an engine on a CPU stores them."""
    from qwen_kernels.attention import page_dtype
    from qwen_kernels.attention.storage import to_storage

    return to_storage(pages, page_dtype(pages.dtype))


def torch_seconds(sizes: Sizes, length: int, rounds: int, rehearse: bool) -> float:
    """Return the seconds of torch's causal attention on a prompt of `length` tokens."""
    import torch

    device = "cpu" if rehearse else "cuda"
    heads = sizes.kv_heads * sizes.group
    q, k, v = (torch.randn(1, count, length, sizes.dim, dtype=torch.bfloat16, device=device)
               for count in (heads, sizes.kv_heads, sizes.kv_heads))

    def run():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def wait():
        if not rehearse:
            torch.cuda.synchronize()

    return clock(run, lambda _: wait(), rounds)


def seconds(run: Callable, arrays: tuple, rounds: int) -> float:
    """Return the median seconds that a call of the JAX function `run` with `arrays` takes."""
    import jax

    return clock(lambda: run(*arrays), jax.block_until_ready, rounds)


def clock(run: Callable, wait: Callable, rounds: int) -> float:
    """Return the median seconds per call of `run`. Several calls are in flight at a time, to hide dispatch costs."""
    wait(run())
    began = time.perf_counter()
    wait(run())
    calls = max(1, min(50, int(0.05 / max(time.perf_counter() - began, 1e-6))))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            last = run()
        wait(last)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def markdown(report: dict) -> str:
    """Return the report as a Markdown page, one table per part."""
    facts = report["facts"]
    lines = [f"# {'Rehearsal' if facts['rehearsal'] else 'GPU check'}: {facts['device']}, {facts['date']}", "",
             ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("device", "date")), ""]
    for name, rows in list(report.items())[1:]:
        lines += [f"## {name}", ""]
        columns = [column for column in dict.fromkeys(key for row in rows for key in row) if column != "output"]
        if columns:
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in rows:
            cells = [row.get(column, "") for column in columns]
            lines.append("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("\n", " ")
                                           for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
