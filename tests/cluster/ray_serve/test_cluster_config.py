"""Tests of a cluster's file: its keys, its errors, and the files that are shipped."""
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
import yaml

from qwen_jax.cli import main
from qwen_jax.cli_cluster import _url
from qwen_jax.cluster.ray_serve.config import ClusterConfig, parse_config, read_config, serve_config
from qwen_jax.errors import UserError

ROOT = Path(__file__).parents[3]
FILES = ROOT / "configs" / "cluster"
SHIPPED = sorted(path for path in FILES.glob("*.yaml") if path.name != "kuberay.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_what_serve_takes(path, capsys):
    schema = pytest.importorskip("ray.serve.schema").ServeDeploySchema
    assert main(["cluster", "up", str(path), "--print"]) == 0
    wanted = yaml.safe_load(capsys.readouterr().out)
    deployed = schema.model_validate(wanted)
    application, = deployed.applications
    again = parse_config(application.deployments[0].user_config, "what was printed")
    assert again == read_config(str(path))
    assert deployed.http_options.port == again.server.port


def test_the_manifest_for_kubernetes_deploys_the_gateway():
    schema = pytest.importorskip("ray.serve.schema").ServeDeploySchema
    manifest = yaml.safe_load((FILES / "kuberay.yaml").read_text())
    spec = manifest["spec"]
    deployed = schema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    application, = deployed.applications
    config = parse_config(application.deployments[0].user_config, "the manifest")
    module, name = application.import_path.split(":")
    __import__(module)
    assert (config.server.host, config.server.port) == (deployed.http_options.host, deployed.http_options.port)
    workers, = spec["rayClusterConfig"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) >= config.resources["GPU"] * config.hosts == config.engine.tp_size
    assert int(limits["cpu"]) >= config.resources["CPU"] and workers["maxReplicas"] == config.replicas.max
    head = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in head["env"]
    assert deployed.http_options.port in [port["containerPort"] for port in head["ports"]]


def test_the_job_for_slurm_starts_ray_on_every_node(tmp_path):
    """A dry run: programs that only note how they are called."""
    calls = tmp_path / "calls"
    for name, more in (("srun", 'case "$*" in *hostname*) echo 10.0.0.1 10.0.0.2;; *" ray "*) sleep 1;; esac'),
                       ("scontrol", 'printf "n1\\nn2\\nn3\\n"'), ("ray", ""), ("qwen-jax", "")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{more}\n')
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
                   "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run(["bash", FILES / "slurm.sh", "cluster.yaml"], env=environment, cwd=tmp_path, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = calls.read_text()
    assert "-w n1 ray start --head --block --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=10.0.0.1 " \
           "--num-cpus=32 --num-gpus=8" in said
    assert "srun --nodes=2 --ntasks=2 --exclude=n1 ray start --block --address=10.0.0.1:6379" in said
    assert "qwen-jax cluster up cluster.yaml --address http://10.0.0.1:8265" in said
    assert said.splitlines()[-1] == "qwen-jax cluster down --address http://10.0.0.1:8265"
    refused = subprocess.run(["bash", FILES / "slurm.sh"], env=environment, cwd=tmp_path, text=True,
                             capture_output=True)
    assert refused.returncode != 0 and "cluster's file" in refused.stderr


@pytest.mark.parametrize("text, said", [
    ("model: bundled\ncolour: red", "unknown key colour"), ("replicas: 2", "model"),
    ("model: bundled\nengine: {max_batch_size: many}", "engine.max_batch_size"),
    ("model: bundled\nreplicas: 0", "replicas"),
    ("model: bundled\nreplicas: {min: 3, max: 2}", "min must be at most max"),
    ("model: bundled\nserver: {port: 70000}", "server.port"), ("model: [", "must be YAML"), ("- a", "the file")])
def test_what_is_wrong_in_a_file_is_said(tmp_path, text, said):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_config(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_config(str(tmp_path / "none.yaml"))


def test_what_can_change_without_a_restart():
    config = ClusterConfig(model="bundled", replicas=2)
    scaled = parse_config({"model": "bundled", "replicas": {"min": 2, "max": 4}}, "")
    assert [scaled.allowed(count) for count in (0, 3, 9)] == [2, 3, 4] and config.allowed(9) == 2
    assert config.same_engines(msgspec.structs.replace(config, replicas=3, surge=False))
    assert not config.same_engines(parse_config({"model": "bundled", "engine": {"max_batch_size": 8}}, ""))
    other = parse_config({"model": "bundled", "server": {"port": 1}, "cache": {"megabytes": 1.0}}, "")
    assert config.needs_restart(other) == ["server", "cache"] and not config.needs_restart(config)
    assert serve_config(config)["applications"][0]["deployments"][0]["user_config"] == {"model": "bundled",
                                                                                       "replicas": 2}


def test_where_a_server_is_asked_how_it_goes():
    """A server is asked at the cluster's head, unless its address says more."""
    assert _url(None, "127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert _url("http://head:8265", "0.0.0.0", 8000) == "http://head:8000"
    assert _url("http://head:8265", "10.0.0.7", 8000) == "http://10.0.0.7:8000"
