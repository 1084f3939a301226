"""Engines as processes under Ray, behind Ray Serve's HAProxy, as ``qwen-jax cluster up`` starts them."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest
import yaml
from live import ROOT, free_port, quick_environment
from served import PAGE_BYTES

pytest.importorskip("ray", reason="needs qwen-jax[ray]")
CONFIG = {"model": "bundled", "replicas": 2, "cache": {"megabytes": 0},
          "engine": {"dtype": "float32", "max_batch_size": 8, "max_seq_len": 1024, "max_adapters": 2,
                     "kv_cache_bytes": 15 * PAGE_BYTES}}
ASK = {"model": "bundled", "max_tokens": 30, "temperature": 0, "ignore_eos": True}


class Cluster:
    def __init__(self, folder, cache):
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        self.config = {**CONFIG, "environment": {**quick_environment(), "QWEN_JAX_CACHE": str(cache)},
                       "server": {"port": self.port, "name": "bundled", "max_requests": 100}}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
                            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()), "RAY_USAGE_STATS_ENABLED": "0"}
        self.errors = (folder / "errors").open("w+")
        options = ("--num-cpus", "4", "--dashboard-port", str(self.dashboard), "--json")
        self.process = self.command("up", self.file(), *options, stdout=subprocess.PIPE, stderr=self.errors)
        ready = self.process.stdout.readline()
        assert ready, (folder / "errors").read_text()
        assert json.loads(ready) == {"url": f"http://127.0.0.1:{self.port}"}

    def command(self, what, *arguments, **options):
        return subprocess.Popen([sys.executable, "-m", "qwen_jax.cli", "cluster", what, *arguments], text=True,
                                env=self.environment, cwd=self.folder, **options)

    def file(self, **changes):
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump({**self.config, **changes}))
        return str(path)

    def asked(self, what, *arguments):
        """Run a command on the running cluster; return its exit code, output and errors."""
        process = self.command(what, *arguments, "--address", f"http://127.0.0.1:{self.dashboard}",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def engines(self):
        return {one["name"]: one for one in self.http.get("/cluster").json()["engines"]}

    def until(self, count):
        end = time.monotonic() + 120
        while sum(one["ready"] for one in self.engines().values()) != count or len(self.engines()) != count:
            assert time.monotonic() < end, self.engines()
            time.sleep(0.1)
        return self.engines()

    def processes(self, name):
        """Return the processes of this cluster whose command line contains ``name``."""
        return [one for one in psutil.Process(self.process.pid).children(recursive=True)
                if name in " ".join(one.cmdline())]

    def text(self, number):
        answer = self.http.post("/v1/completions", json={**ASK, "prompt": f"hello {number}"})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    @contextmanager
    def traffic(self):
        """Run three callers, who leave time for an engine to start; yield a counter of their answers."""
        told, ended = Counter(), threading.Event()

        def caller(number):
            while not ended.wait(0.1):
                answer = self.http.post("/v1/completions", json={**ASK, "prompt": f"hello {number}"})
                right = answer.status_code == 200
                told[number, answer.json()["choices"][0]["text"] if right else answer.text] += 1

        with ThreadPoolExecutor(3) as threads:
            running = [threads.submit(caller, number) for number in range(3)]
            try:
                yield told
            finally:
                ended.set()
            for one in running:
                one.result()


@pytest.fixture(scope="module")
def cluster(executable_cache, tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"), executable_cache)
    made.until(2)
    made.right = {(number, made.text(number)) for number in range(3)}
    yield made
    started = made.processes("")
    made.process.terminate()
    assert made.process.wait(60) == 130, (made.folder / "errors").read_text()
    _, left = psutil.wait_procs(started, 20)
    assert not [one for one in left if "haproxy" in one.name() or "serving.engine_process" in " ".join(one.cmdline())]


def test_a_killed_engine_takes_no_request_with_it(cluster):
    before = set(cluster.engines())
    with cluster.traffic() as told:
        time.sleep(0.5)
        cluster.processes("qwen_jax.serving.engine_process.process")[0].send_signal(signal.SIGKILL)
        while len(before & set(cluster.engines())) == 2:
            time.sleep(0.05)
        cluster.until(2)
    assert set(told) == cluster.right and len(before & set(cluster.engines())) == 1


def test_a_killed_actor_ends_its_engine_and_both_come_back(cluster):
    before = set(cluster.engines())
    workers = cluster.processes("qwen_jax.serving.engine_process.process")
    with cluster.traffic() as told:
        cluster.processes("ray::Host")[0].send_signal(signal.SIGKILL)
        while len(before & set(cluster.engines())) == 2:
            time.sleep(0.05)
        cluster.until(2)
    assert set(told) == cluster.right
    gone, _ = psutil.wait_procs(workers, 20)
    assert len(gone) == 1  # an engine whose devices Ray gives to others must not go on


@pytest.mark.slow
def test_other_engines_take_over_one_after_another(cluster):
    before = set(cluster.engines())
    gateway = cluster.processes("ServeReplica:qwen-jax")[0].pid
    with cluster.traffic() as told:
        others = {**cluster.config["environment"], "OF_THE_SECOND_KIND": "yes"}  # the same programs: nothing to compile
        code, out, err = cluster.asked("up", cluster.file(environment=others))
        assert code == 0 and "ready" in out, err
    assert set(told) == cluster.right
    after = cluster.until(2)
    assert not before & set(after)
    workers = cluster.processes("qwen_jax.serving.engine_process.process")
    assert [one.environ().get("OF_THE_SECOND_KIND") for one in workers] == ["yes"] * 2
    assert [one.pid for one in cluster.processes("ServeReplica:qwen-jax")] == [gateway]
    code, out, _ = cluster.asked("status")
    assert code == 0 and out.startswith("RUNNING") and all(f"{name}: ready" in out for name in after)

    # What cannot be leaves everything as it is, and is said.
    code, _, err = cluster.asked("up", cluster.file(environment=others, model="nowhere"))
    assert code == 2 and "nowhere" in err
    code, _, err = cluster.asked("up", cluster.file(environment=others, cache={"megabytes": 1}))
    assert code == 2 and "cache" in err and "cannot change" in err
    assert set(cluster.until(2)) == set(after) and {(number, cluster.text(number)) for number in range(3)} == (
        cluster.right)


@pytest.mark.slow
def test_an_engine_of_two_processes(cluster):
    """An engine of two processes is started again when one of them is killed."""
    flags = f"{quick_environment()['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    wanted = cluster.file(engine={**CONFIG["engine"], "tp_size": 2, "max_seq_len": 512}, hosts=2, replicas=1,
                          environment={**cluster.config["environment"], "XLA_FLAGS": flags})
    code, _, err = cluster.asked("up", wanted)
    assert code == 0, err
    before = cluster.until(1)
    assert len(cluster.processes("qwen_jax.serving.engine_process.process")) == 2
    assert {(number, cluster.text(number)) for number in range(3)} == cluster.right
    cluster.processes("qwen_jax.serving.engine_process.process")[1].send_signal(signal.SIGKILL)
    while set(cluster.engines()) == set(before):
        time.sleep(0.05)
    cluster.until(1)
    assert cluster.text(0) in dict(cluster.right).values()
