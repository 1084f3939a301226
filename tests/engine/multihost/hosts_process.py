"""Program of the two processes of test_hosts.py: ``python hosts_process.py PART PORT PROCESS FOLDER``."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
from parallel_bench import GREEDY, LIMITS, prompts
from quick_xla import QUICK

from qwen_jax import Engine, SamplingParams, UserError, join
from qwen_jax.checkpoint import resolve

SAMPLED = SamplingParams(max_tokens=8, temperature=1.0, seed=7, ignore_eos=True)


def engine_of(folder: Path, **options) -> Engine:
    return Engine(resolve(folder / "v0"), **{"tp_size": 8, "limits": LIMITS, "dtype": "float32", "progress": False,
                                             "max_adapters": 2, "max_adapter_rank": 4, "cache_dir": folder / "cache",
                                             **options})


def tokens(engine: Engine, params=GREEDY, adapter=None) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(prompts(), params, adapter)]


def refusal(call, *arguments, **options) -> str:
    try:
        call(*arguments, **options)
    except UserError as error:
        return str(error)
    return "not refused"


def lead(engine: Engine, folder: Path) -> dict:
    """Use an engine of both processes and return what it answers. Only process 0's folder has "only_here"."""
    found = {"greedy": tokens(engine), "sampled": tokens(engine, SAMPLED)}
    found["no_adapter"] = refusal(engine.load_adapter, "b", "only_here/adapter")
    engine.load_adapter("a", folder / "adapter")
    found["adapter"], found["names"] = tokens(engine, adapter="a"), engine.adapters.names
    found["no_weights"] = refusal(engine.update_weights, "only_here/v1")
    found["version"] = engine.update_weights(folder / "v1")
    found["updated"] = tokens(engine)
    engine.rollback()
    found["rolled_back"] = tokens(engine)
    engine.unload_adapter("a")
    found["in_place"] = refusal(engine.update_weights, folder / "v1", in_place=True)
    found["module"] = refusal(engine.update_weights, {})
    found["reshard"] = refusal(engine.reshard, replace(engine.plan, data=2))
    found["compiles"] = engine.stats().compiles_after_warmup
    return found


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {QUICK}"
    part, port, process, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    join(f"localhost:{port}", 2, process)
    found = {}
    if part == "work":
        found = {name: refusal(engine_of, folder, **options) for name, options in
                 (("half", {"tp_size": 4}), ("stages", {"tp_size": 4, "pp_size": 2}),
                  ("data", {"tp_size": 4, "dp_size": 2}))}
        found["different"] = refusal(engine_of, folder, max_adapters=1 + process, warmup=False)
    engine = engine_of(folder, warmup=part != "wait")
    found["from_disk"] = all(program.from_disk for program in engine.runner.executables.programs.values())
    if process == 0 and part == "work":
        found.update(lead(engine, folder))
    if process == 1:
        found["generate"] = refusal(engine.generate, [[1, 2]], GREEDY)
        found["load_adapter"] = refusal(engine.load_adapter, "a", folder / "adapter")
    (folder / f"{part}{process}.part").write_text(json.dumps(found))
    (folder / f"{part}{process}.part").rename(folder / f"{part}{process}.json")
    if process == 1:
        engine.follow()
        print("followed to the end")
        return
    if part == "end":
        tokens(engine)
        engine.close()
        print(refusal(engine.generate, [[1, 2]], GREEDY))
    while part == "work":
        tokens(engine)
    while part == "wait":
        time.sleep(1)


if __name__ == "__main__":
    main()
    print(f"process {jax.process_index()} ends", flush=True)
