"""Updates of the weights over HTTP, while requests are answered."""
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from live import Live, free_port
from safetensors.numpy import load_file, save_file
from served import SIZES

from qwen_jax import convert
from qwen_jax.checkpoint.source import SHIPPED

ASK = {"model": "bundled", "prompt": "hello", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bundled model with other weights, and with wrong ones."""
    root = tmp_path_factory.mktemp("weights")
    tensors = load_file(SHIPPED["bundled"] / "model.safetensors")

    def variant(name, change):
        shutil.copytree(SHIPPED["bundled"], root / name)
        changed = dict(tensors)
        change(changed)
        save_file(changed, root / name / "model.safetensors")

    def other(found):
        rng = np.random.default_rng(0)
        for key, value in found.items():
            if value.ndim == 2:
                found[key] = (value.astype(np.float32) + .02 * rng.normal(size=value.shape)).astype(value.dtype)

    key = "model.layers.0.mlp.up_proj.weight"
    variant("other", other)
    variant("nan", lambda found: found.update({key: np.full_like(found[key], np.nan)}))
    variant("shape", lambda found: found.update({key: found[key][:, :-2].copy()}))
    variant("missing", lambda found: found.pop(key))
    variant("overflow", lambda found: found.update({
        name: np.full_like(value, 3e38) for name, value in found.items() if "norm" in name}))
    variant("corrupt", lambda found: None)
    path = root / "corrupt" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return root


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("admin key\n")
    return path


@pytest.fixture
def pair(own, keys):
    """A server and a client of its admin port."""
    port = free_port()
    server = own("--admin-port", str(port), "--admin-keys", str(keys))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60,
                      headers={"Authorization": "Bearer admin key"}) as client:
        yield server, client


def test_weights_change_and_go_back_while_requests_run(pair, folders):
    server, admin = pair

    def text():
        answer = server.post("/v1/completions", ASK)
        version = answer.headers["x-weight-version"]
        assert answer.json()["system_fingerprint"].endswith(f"-w{version}")
        return answer.json()["choices"][0]["text"], version

    old = text()
    assert old[1] == "0"
    with ThreadPoolExecutor(4) as threads:
        long = threads.submit(server.post, "/v1/completions", {**ASK, "max_tokens": 400, "ignore_eos": True})
        streams = [threads.submit(server.post, "/v1/completions", {**ASK, "max_tokens": 300, "stream": True,
                                                                   "ignore_eos": True}) for _ in range(2)]
        while server.stats()["last_step"]["running"] < 3:
            pass
        done = admin.post("/admin/weights", json={"source": str(folders / "other"), "wait": True})
        assert done.status_code == 200 and done.json()["version"] == 1, done.text
        new = text()
        assert new[1] == "1" and new[0] != old[0]
        assert long.result().headers["x-weight-version"] == "0"  # it had begun
        for stream in streams:
            prints = {json.loads(line[6:])["system_fingerprint"] for line in stream.result().text.splitlines()
                      if line.startswith("data: {")}
            assert len(prints) == 1 and prints.pop().endswith("-w0")
    assert admin.post("/admin/weights/rollback").json()["version"] == 0
    assert text() == old
    status = admin.get("/admin/weights").json()
    assert status["versions"] == [0, 1] and status["update"]["state"] == "current"
    assert server.stats()["engine"]["compiles_after_warmup"] == 0


def test_what_is_refused_changes_nothing(pair, folders, keys):
    server, admin = pair
    before = server.post("/v1/completions", ASK).json()["choices"]
    assert admin.post("/admin/weights/rollback").status_code == 400  # there is nothing before
    for name, said in (("nan", "NaN"), ("shape", "up_proj"), ("missing", "up_proj"), ("corrupt", "truncated"),
                       ("absent", "no model"), ("overflow", "golden prompt")):
        answer = admin.post("/admin/weights", json={"source": str(folders / name), "wait": True})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
        assert admin.get("/admin/weights").json()["update"]["state"] == "refused"
    golden = {"source": str(folders / "other"), "wait": True, "golden": [["hello", [1, 2, 3]]]}
    assert "golden prompt" in admin.post("/admin/weights", json=golden).text
    assert "golden prompt" in admin.post("/admin/weights", json={**golden, "source": str(folders / "overflow")}).text
    unreadable = admin.post("/admin/weights", json={"source": "x" * 5000, "wait": True})
    assert unreadable.status_code == 400 and "too long" in unreadable.text
    assert admin.get("/admin/weights").json()["update"]["state"] == "refused"
    for body in ({"source": ""}, {"policy": "x"}, {"source": "x", "colour": 1}, [], {"source": "x", "golden": [1]}):
        assert admin.post("/admin/weights", json=body).status_code == 400
    assert server.post("/v1/completions", ASK).json()["choices"] == before
    assert admin.get("/admin/weights").json()["version"] == 0
    # Keys and ports are apart.
    assert httpx.get(f"{admin.base_url}/admin/weights", headers={"Authorization": "Bearer x"}).status_code == 401
    assert server.http.get("/admin/weights").status_code == 404
    # Updates run one at a time.
    with ThreadPoolExecutor(6) as threads:
        codes = [answer.status_code for answer in threads.map(
            lambda _: admin.post("/admin/weights", json={"source": str(folders / "other")}), range(6))]
    assert codes.count(202) >= 1 and set(codes) <= {202, 409} and 409 in codes


def test_servers_of_a_machine_share_the_host_copy(executable_cache, folders, keys, tmp_path):
    """Two servers of a converted checkpoint, and an update of both to another: read from the same files in memory."""
    first, second = convert("bundled", tmp_path / "first"), convert(folders / "other", tmp_path / "second")
    root = Path(f"/dev/shm/qwen-jax-{os.getuid()}")
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no shared memory in /dev/shm")
    before = set(root.iterdir()) if root.exists() else set()
    ports, servers = [free_port(), free_port()], []
    try:
        arguments = [*SIZES, "--share-weights", "--admin-keys", str(keys)]
        servers = [Live(*arguments, "--admin-port", str(port), model=str(first), wait=False) for port in ports]
        for server in servers:
            server.wait_until_ready()
        assert len(set(root.iterdir()) - before) == 1
        texts = {server.post("/v1/completions", ASK).json()["choices"][0]["text"] for server in servers}
        assert len(texts) == 1
        for port in ports:
            done = httpx.post(f"http://127.0.0.1:{port}/admin/weights", json={"source": str(second), "wait": True},
                              headers={"Authorization": "Bearer admin key"}, timeout=60)
            assert done.status_code == 200, done.text
        assert len(set(root.iterdir()) - before) == 2
        after = {server.post("/v1/completions", ASK).json()["choices"][0]["text"] for server in servers}
        assert len(after) == 1 and after != texts
    finally:
        for server in servers:
            server.process.terminate()
        for server in servers:
            server.process.wait(20)
            server.output()
    assert set(root.iterdir()) - before == set()


def test_an_admin_port_needs_keys(own):
    server = own("--admin-port", str(free_port()), wait=False)
    assert server.process.wait(60) == 2 and "--admin-keys" in server.output()
