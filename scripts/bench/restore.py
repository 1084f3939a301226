"""Measure the peak memory of restoring a checkpoint onto two processes' devices, against what each process must hold.

    python scripts/bench/restore.py [--folder DIR] [--case NAME]

For each case the script makes a bfloat16 checkpoint with random weights of about 2 GB, real layer shapes and few
layers, starts processes that meet through `jax.distributed` on localhost, each with simulated CPU devices, and
restores onto a ``tensor`` axis over all of them. It prints a JSON line per case: for every process the bytes of its
devices' shards, the bytes read from files, the resident memory before loading and at its peak (imports included,
nothing subtracted), and the bar, 1.2 x the shards + 500 MB. It needs about twice the checkpoint's size on disk and
deletes what it made. The exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from convert import make_checkpoint

from qwen_jax.checkpoint import convert
from qwen_jax.config import ModelConfig

FACTOR, SLACK = 1.2, 500e6  # the bar


@dataclass(frozen=True)
class Case:
    """A checkpoint to restore: a preset with `layers` layers, onto `processes` processes of `devices` devices each."""

    preset: str
    layers: int
    processes: int
    devices: int

    @property
    def config(self) -> ModelConfig:
        return replace(ModelConfig.preset(self.preset), num_layers=self.layers, tie_word_embeddings=True)


CASES = {
    "direct": Case("qwen2.5-14b", 2, 2, 4),  # 8 KV heads, the rest divides by 8: no shape changes
    "expanded": Case("qwen2.5-3b", 9, 2, 3),  # 2 KV heads on 6 devices; the vocabulary and the MLP are padded
    "one process": Case("qwen2.5-14b", 2, 1, 5),  # 8 KV heads on 5 devices
}

CHILD = """
import json, sys, time
import jax, numpy as np
address, index, count, folder, tensor = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
if count > 1:
    jax.distributed.initialize(address, count, index)
from functools import partial
from jax.sharding import AxisType, Mesh, NamedSharding
from qwen_jax.checkpoint import load_params, resolve
from qwen_jax.model.abstract import abstract
from qwen_jax.parallel.layout import best_layout, expand, expanded_shape
from qwen_jax.parallel.mesh import spec_of

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def read_so_far():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))

source = resolve(folder)
config, mesh = source.config, Mesh(np.array(jax.devices()), ("tensor",), axis_types=(AxisType.Auto,))
assert mesh.size == tensor
layout, shardings, changed = best_layout(config, tensor, 65_536), {}, {}
for path, spec in abstract(config).items():
    shape = expanded_shape(spec.shape, spec.axes, layout)
    shardings[path] = NamedSharding(mesh, spec_of(spec.axes, shape, mesh))
    if shape != spec.shape:
        changed[path] = partial(expand, axes=spec.axes, layout=layout)
before, read, start = memory("VmRSS"), read_so_far(), time.perf_counter()
params = jax.block_until_ready(load_params(source, config, shardings=shardings, expand=changed))
seconds = time.perf_counter() - start
shards = sum(shard.data.nbytes for value in params.values() for shard in value.addressable_shards)
print(json.dumps({"shards": shards, "read": read_so_far() - read, "before": before, "peak": memory("VmHWM"),
                  "seconds": round(seconds, 1), "expanded": len(changed)}))
"""


def restore(case: Case, folder: Path) -> list[dict]:
    """Restore the checkpoint in `folder` with the case's processes; return each one's bytes, memory and seconds."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": f"--xla_force_host_platform_device_count={case.devices}"}
    tensor = case.processes * case.devices
    children = [subprocess.Popen([sys.executable, "-c", CHILD, address, str(index), str(case.processes), str(folder),
                                  str(tensor)], env=environment, stdout=subprocess.PIPE, text=True)
                for index in range(case.processes)]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("a restoring process failed: see above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--case", choices=list(CASES), help="default: all")
    args = parser.parse_args()
    missed = False
    for name in [args.case] if args.case else CASES:
        case, work = CASES[name], Path(tempfile.mkdtemp(prefix="bench-restore-", dir=args.folder))
        try:
            print(f"{name}: making the checkpoint ...", file=sys.stderr)
            make_checkpoint(work / "hf", case.config, 1)
            convert(work / "hf", work / "orbax")
            shutil.rmtree(work / "hf")
            measured = restore(case, work / "orbax")
            size = sum(file.stat().st_size for file in (work / "orbax").rglob("*") if file.is_file())
        finally:
            shutil.rmtree(work, ignore_errors=True)
        bars = [FACTOR * process["shards"] + SLACK for process in measured]
        met = all(process["peak"] <= bar for process, bar in zip(measured, bars, strict=True))
        missed |= not met
        processes = [{key + "_mb": round(process[key] / 1e6) for key in ("shards", "read", "before", "peak")} |
                     {"bar_mb": round(bar / 1e6), "seconds": process["seconds"],
                      "expanded_parameters": process["expanded"]}
                     for process, bar in zip(measured, bars, strict=True)]
        print(json.dumps({"case": name, "model": case.preset, "layers": case.layers, "checkpoint_mb": round(size / 1e6),
                          "tensor": case.processes * case.devices, "processes": processes, "met": met}), flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
