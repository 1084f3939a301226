"""The training loop: metrics and checkpoints, resuming bit for bit, and ending with a reason."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.training import checkpoints
from qwen_jax.training.batch import Batch
from qwen_jax.training.loop import Run, fit
from qwen_jax.training.recipe import Optimizer
from qwen_jax.training.step import init_state, make_optimizer, make_train_step

OPTIMIZER = make_optimizer(Optimizer(learning_rate=1e-2, warmup_steps=2), 30)


def loss(trainable, frozen, batch):
    """Return the squared distance of w from the tokens' mean: a loss that compiles in a moment."""
    error = jnp.square(trainable["w"] - batch.tokens.mean()) * frozen["scale"]
    return error.sum(), (jnp.float32(error.size), {"accuracy": jnp.float32(0)})


STEP = make_train_step(loss, OPTIMIZER)


def start():
    return init_state({"w": jnp.arange(6.0).reshape(2, 3)}, OPTIMIZER)


def batch_of(step):
    tokens = np.random.default_rng(step).integers(0, 9, (2, 8)).astype(np.int32)
    return Batch(tokens, np.ones((2, 8), np.float32), np.zeros((2, 8), np.int32), np.zeros((2, 8), np.int32))


def run(folder, **changes):
    settings = {"steps": 30, "checkpoint_every": 5, "keep": 2, "max_skipped": 3, "facts": {"seed": 0}}
    return Run(folder, **settings | changes)


def go(folder, batches=batch_of, scale=1.0, evaluate=None, **changes):
    return fit(start(), STEP, {"scale": jnp.float32(scale)}, batches, run=run(folder, **changes), evaluate=evaluate)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_interrupted_run_continues_to_the_same_state(tmp_path):
    def interrupted(step):
        if step == 18:
            raise KeyboardInterrupt
        return batch_of(step)

    whole = go(tmp_path / "whole", evaluate=lambda state: {"accuracy": 0.5})
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", interrupted)
    asked = []
    same(whole, go(tmp_path / "cut", lambda step: asked.append(step) or batch_of(step)))
    assert asked == list(range(16, 31)), "it continues after the last checkpoint"
    assert [x["step"] for x in lines(tmp_path / "whole") if "loss" not in x] == [5, 10, 15, 20, 25, 30]
    assert [x["step"] for x in lines(tmp_path / "cut")] == [10, 20, 30]
    assert {"loss", "gradient_norm", "tokens_per_second", "skipped"} <= lines(tmp_path / "cut")[0].keys()


def test_the_last_checkpoints_are_kept(tmp_path):
    go(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000025", "step-00000030"]


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.training.test_loop import batch_of, go
print("ready", flush=True)
# 30 steps take longer than two of the times after which it is killed, however fast the machine is.
go(Path(sys.argv[2]), lambda step: time.sleep(0.1) or batch_of(step), steps=30, checkpoint_every=1)
"""


def test_killed_at_random_moments_it_still_ends_bit_for_bit(tmp_path):
    """SIGKILL ends the run at ten random moments; then one run goes to the end."""
    whole = go(tmp_path / "whole", checkpoint_every=1)
    root, rng, kills = str(Path(__file__).parents[2]), random.Random(0), 0
    while kills < 10:
        child = subprocess.Popen([sys.executable, "-c", KILLED, root, str(tmp_path / "killed")], cwd=root, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 env={**os.environ, "JAX_PLATFORMS": "cpu"})
        child.stdout.readline()
        time.sleep(rng.uniform(0.2, 1.2))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        if child.returncode == 0:
            break  # the run ended before the signal came
    assert kills >= 3
    same(whole, go(tmp_path / "killed", checkpoint_every=1))
    assert not list((tmp_path / "killed").glob(".step*")), "what a killed save left is cleaned up"


def test_another_run_in_the_folder_is_refused(tmp_path):
    go(tmp_path, steps=10)
    with pytest.raises(UserError, match="a run with another seed"):
        go(tmp_path, facts={"seed": 1})


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    go(tmp_path, steps=10)
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.orbax_store, "write", full)
    with pytest.raises(UserError, match="the disk filled up"):
        go(tmp_path, steps=20)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir() if "step" in path.name) == ["step-00000005", "step-00000010"]
    same(go(tmp_path), go(tmp_path / "whole"))


def test_gradients_that_stay_non_finite_end_the_run(tmp_path):
    with pytest.raises(UserError, match=r"gradients of 5 steps in a row were not finite, first that of w \(1 of 1"):
        go(tmp_path, scale=float("nan"))


def test_a_state_continues_on_another_mesh(tmp_path):
    """A state is saved from one device and restored over four, then the other way round."""
    code = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qwen_jax.training import checkpoints
like = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "n": np.int32(3)}
mesh = Mesh(np.array(jax.devices()), ("data",))
single = jax.device_put(like, jax.devices()[0])
spread = {"w": jax.device_put(like["w"], NamedSharding(mesh, P("data"))),
          "n": jax.device_put(like["n"], NamedSharding(mesh, P()))}
for number, (source, target) in enumerate([(single, spread), (spread, single), (spread, spread)], 1):
    checkpoints.save(Path(sys.argv[1]), number, source, {}, keep=1)
    step, found = checkpoints.restore(Path(sys.argv[1]), target, {})
    assert step == number
    for name in like:
        assert found[name].sharding == target[name].sharding, (number, name)
        np.testing.assert_array_equal(found[name], like[name])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2],
                   env={**os.environ, "JAX_PLATFORMS": "cpu"})
