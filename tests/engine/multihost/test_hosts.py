"""An engine over two processes with four devices each: the answers of one device, and the end when a process dies."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hosts_process import SAMPLED, tokens
from parallel_bench import LIMITS, shrunk

from qwen_jax import Engine, UserError, join
from qwen_jax.checkpoint import save_hf
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.engine.multihost.rendezvous import devices_of_task, from_environment
from qwen_jax.model import init
from qwen_jax.model.lora import LoraConfig, init_adapter

HERE = Path(__file__).parent
CONFIG = shrunk("7b", dtype="float32", num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two versions of a model, an adapter, and two folders to run in, of which the first has links to these."""
    root = tmp_path_factory.mktemp("hosts")
    for seed in (0, 1):
        save_hf(init(CONFIG, seed, "float32"), CONFIG, root / f"v{seed}")
    rng, lora = np.random.default_rng(0), LoraConfig(4, 8.0, ("q_proj", "down_proj"))
    adapter = {key: jnp.asarray(0.4 * rng.normal(size=value.shape), jnp.float32)
               for key, value in init_adapter(CONFIG, lora).items()}
    save_adapter(adapter, CONFIG, lora, root / "adapter")
    for process in (0, 1):
        (root / str(process)).mkdir()
    only = root / "0" / "only_here"
    only.mkdir()
    (only / "adapter").symlink_to(root / "adapter")
    (only / "v1").symlink_to(root / "v1")
    return root


class Pair:
    def __init__(self, part: str, folder: Path) -> None:
        self._part, self._folder = part, folder
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        project = HERE.parents[2]
        places = project, project / "kernels", project / "tests", project / "tests" / "engine"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
        self.processes = [subprocess.Popen(
            [sys.executable, HERE / "hosts_process.py", part, str(port), str(process), folder], env=environment,
            cwd=folder / str(process), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for process in (0, 1)]

    def found(self, process: int, seconds: float = 300) -> dict:
        path, end = self._folder / f"{self._part}{process}.json", time.monotonic() + seconds
        while not path.exists():
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended and time.monotonic() < end, "\n".join(self.outputs())
            time.sleep(0.1)
        return json.loads(path.read_text())

    def outputs(self) -> list[str]:
        for process in self.processes:
            process.kill()
        return [process.communicate()[0] for process in self.processes]

    def kill_and_wait(self, victim: int) -> tuple[float, str]:
        """Kill a process; return the seconds until the other had ended, and what that printed."""
        other = self.processes[1 - victim]
        self.processes[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        printed = other.communicate(timeout=60)[0]
        return time.monotonic() - began, printed


@pytest.fixture
def pair(folder):
    pairs = []

    def start(part: str) -> Pair:
        pairs.append(Pair(part, folder))
        return pairs[-1]

    yield start
    for started in pairs:
        started.outputs()


def test_two_processes_answer_as_one_device_and_end_together(pair, folder):
    both = pair("work")
    found, follower = both.found(0), both.found(1)
    alone = Engine(init(CONFIG, 0, "float32"), limits=LIMITS, progress=False, max_adapters=2, max_adapter_rank=4)
    alone.load_adapter("a", folder / "adapter")
    assert found["greedy"] == tokens(alone) == found["rolled_back"]
    assert found["sampled"] == tokens(alone, SAMPLED)
    assert found["adapter"] == tokens(alone, adapter="a") != found["greedy"] and found["names"] == ["a"]
    alone.update_weights(folder / "v1")
    assert found["updated"] == tokens(alone) != found["greedy"] and found["version"] == 1
    assert found["compiles"] == 0
    assert "process 1" in found["no_adapter"] and "process 1" in found["no_weights"]
    for refused in (found, follower):
        assert "leaves devices" in refused["half"]
        assert "one replica of one stage" in refused["stages"] == refused["data"]
        assert "process 1 made another engine" in refused["different"]
    assert "could fail half-way" in found["in_place"] and "folder" in found["module"] and "its plan" in found["reshard"]
    assert "call follow()" in follower["generate"] == follower["load_adapter"]
    seconds, printed = both.kill_and_wait(1)  # while process 0 generates
    assert seconds < 20 and both.processes[0].returncode == 1
    assert "process 1 of 2 has ended; process 0 cannot go on" in printed


def test_others_return_when_process_0_closes(pair):
    both = pair("end")
    assert both.found(0)["from_disk"] and both.found(1)["from_disk"]  # what the test before kept
    printed = [process.communicate(timeout=120)[0] for process in both.processes]
    assert [process.returncode for process in both.processes] == [0, 0], printed
    assert "the engine is closed" in printed[0] and "followed to the end" in printed[1]


def test_others_end_when_process_0_dies(pair):
    both = pair("wait")
    both.found(0), both.found(1)
    seconds, printed = both.kill_and_wait(0)
    assert seconds < 20 and both.processes[1].returncode == 1
    assert "process 0 of 2 has ended; process 1 cannot go on" in printed


def test_where_the_other_processes_are():
    torchrun = {"MASTER_ADDR": "node0", "MASTER_PORT": "1234", "WORLD_SIZE": "4", "RANK": "2"}
    assert from_environment(torchrun) == ("node0:1234", 4, 2)
    assert from_environment({**torchrun, "RANK": ""}) == (None, None, None)
    one_task, two_tasks = ({"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": "8"}
                           for tasks in ("1(x4)", "2(x4)"))
    assert devices_of_task(one_task) == list(range(8)) and devices_of_task(two_tasks) is devices_of_task({}) is None


def test_join_refuses_half_an_address():
    with pytest.raises(UserError, match="together"):
        join("localhost:1", 2)


def test_an_engine_of_one_process_follows_nobody():
    engine = Engine(init(CONFIG, 0, "float32"), limits=LIMITS, warmup=False)
    with pytest.raises(UserError, match="beside process 0"):
        engine.follow()
    engine.close()
