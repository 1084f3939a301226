"""Tests of servers with a response cache: which repetitions are answered from it, also with Redis."""
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from live import Live, free_port
from random_adapter import save_random_adapter
from redis_server import INSTALLED, RedisServer
from safetensors.numpy import load_file, save_file
from served import SIZES

from qwen_jax.checkpoint.source import SHIPPED

ASK = {"model": "bundled", "prompt": "hello", "max_tokens": 8, "temperature": 0}
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "other"
    shutil.copytree(SHIPPED["bundled"], folder)
    rng = np.random.default_rng(0)
    tensors = {key: (value.astype(np.float32) + .02 * rng.normal(size=value.shape)).astype(value.dtype)
               if value.ndim == 2 else value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def redis():
    if not INSTALLED:
        assert "QWEN_JAX_CI" not in os.environ, "redis-server is missing"
        pytest.skip("redis-server is not installed")
    found = RedisServer()
    yield found
    found.close()


@pytest.fixture(scope="module")
def servers(executable_cache, redis, tmp_path_factory):
    """Two servers with API keys that share a Redis, and the address of the first one's admin port."""
    root = tmp_path_factory.mktemp("keys")
    (root / "keys").write_text("a\nb\n")
    (root / "admin").write_text("admin\n")
    port = free_port()
    sizes = SIZES[:-2]
    options = ("--api-keys", str(root / "keys"), "--redis-url", redis.url)
    admin = ("--admin-port", str(port), "--admin-keys", str(root / "admin"))
    made = [Live(*sizes, *options, *admin, wait=False), Live(*sizes, *options, wait=False)]
    for server in made:
        server.http.headers["Authorization"] = "Bearer a"
        server.wait_until_ready()
        wait_until_known(server)
    yield *made, f"http://127.0.0.1:{port}"
    for server in made:
        server.output()


def ask(server, path="/v1/completions", key="a", **change):
    """Return the header X-Cache, None if missing, and the body without what is each answer's own."""
    answer = server.post(path, {**ASK, **change}, headers={"Authorization": f"Bearer {key}"})
    return answer.headers.get("x-cache"), told(answer.json())


def told(body):
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def wait_until_known(server):
    """Until an engine has reported the contents of its weights, without which nothing is kept."""
    end = time.monotonic() + 20
    while ask(server, prompt=f"known? {time.monotonic()}", max_tokens=1)[0] is None:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_only_exact_repetitions_are_answered_from_the_cache(servers, tmp_path):
    server, _, _ = servers
    how, first = ask(server, prompt="once")
    assert how == "miss" and ask(server, prompt="once") == ("hit", first)
    assert ask(server, prompt="once", user="another user") == ("hit", first)
    for change in ({"max_tokens": 7}, {"prompt": "once "}, {"stop": "x"}, {"logprobs": 1}, {"n": 2}):
        assert ask(server, **{"prompt": "once", **change})[0] == "miss", change
    assert ask(server, prompt="once", key="b")[0] == "miss"  # another tenant
    by_other_header = [httpx.post(f"{server.url}/v1/completions", json={**ASK, "prompt": prompt}, timeout=60,
                                  headers={"x-api-key": key})
                       for prompt, key in (("once", "a"), ("only a's", "a"), ("only a's", "b"))]
    assert [one.headers["x-cache"] for one in by_other_header] == ["hit", "miss", "miss"]
    for change in ({"temperature": 1}, {"stream": True}):
        answers = [server.post("/v1/completions", {**ASK, "prompt": "once", **change}) for _ in range(2)]
        assert all("x-cache" not in one.headers and one.status_code == 200 for one in answers)
    default = {name: value for name, value in ASK.items() if name != "temperature"}
    assert "x-cache" not in server.post("/v1/completions", default).headers
    for path, body in (("/score", {"prompt": "a", "continuation": "b"}), ("/v1/embeddings", {"input": "a"}),
                       ("/classify", {"input": "a", "labels": ["b", "c"]})):
        answers = [server.post(path, {"model": "bundled", **body}) for _ in range(2)]
        assert [one.headers["x-cache"] for one in answers] == ["miss", "hit"]
        assert answers[0].json() == answers[1].json()
    assert server.post("/v1/completions", {**ASK, "max_tokens": 0}).status_code == 400
    assert server.post("/v1/completions", {**ASK, "model": "unknown"}).status_code == 404
    nameless = {name: value for name, value in ASK.items() if name != "model"}
    answers = [server.post("/v1/completions", {**nameless, "prompt": "once"}) for _ in range(2)]
    assert [one.headers["x-cache"] for one in answers] == ["hit", "hit"] and told(answers[0].json()) == first
    assert answers[0].json()["id"] != answers[1].json()["id"]
    assert server.post("/v1/completions", {**ASK, "prompt": "once"}, headers={"Authorization": "Bearer c"}
                       ).status_code == 401
    save_random_adapter(tmp_path / "one")
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    texts = []
    for seed in (0, 1):  # another adapter under the same name
        shutil.rmtree(tmp_path / "one")
        save_random_adapter(tmp_path / "one", seed)
        assert server.post(load, {"lora_name": "it", "lora_path": str(tmp_path / "one")}).status_code == 200
        how, body = ask(server, prompt="once", model="it", max_tokens=20)
        assert how == "miss" and ask(server, prompt="once", model="it", max_tokens=20) == ("hit", body)
        texts.append(body["choices"][0]["text"])
        assert server.post(unload, {"lora_name": "it"}).status_code == 200
    assert texts[0] != texts[1] and ask(server, prompt="once", model="it")[0] is None


def test_identical_requests_are_computed_once(servers):
    server, _, _ = servers
    before = server.stats()["engine"]["generated_tokens"]
    with ThreadPoolExecutor(10) as threads:
        bodies = [one.json() for one in threads.map(
            lambda _: server.post("/v1/completions", {**ASK, "prompt": "all at once", "max_tokens": 300,
                                                      "ignore_eos": True}), range(10))]
    assert all(told(body) == told(bodies[0]) for body in bodies) and len({body["id"] for body in bodies}) == 10
    assert server.stats()["engine"]["generated_tokens"] - before == 300


def test_other_weights_have_other_answers(servers, other_weights):
    server, _, admin = servers
    old = ask(server, prompt="by version")[1]["choices"][0]["text"]
    changed = httpx.post(f"{admin}/admin/weights", json={"source": str(other_weights), "wait": True}, headers=ADMIN,
                         timeout=60)
    assert changed.status_code == 200, changed.text
    wait_until_known(server)
    how, new = ask(server, prompt="by version")
    assert how == "miss" and new["choices"][0]["text"] != old
    assert ask(server, prompt="by version") == ("hit", new)
    assert httpx.post(f"{admin}/admin/weights/rollback", headers=ADMIN, timeout=60).status_code == 200
    assert ask(server, prompt="by version")[1]["choices"][0]["text"] == old


def test_servers_share_what_redis_holds_and_do_without_it(servers, redis):
    first, second, _ = servers
    end, number = time.monotonic() + 20, 0
    while True:  # answers are written to Redis in the background
        number += 1
        _, body = ask(first, prompt=f"for both {number}")
        time.sleep(0.1)
        if (found := ask(second, prompt=f"for both {number}")) == ("hit", body):
            break
        assert found[0] == "miss" and time.monotonic() < end
    redis.kill()
    for number in range(20):
        how, answer = ask(second, prompt=f"without {number}")
        assert how == "miss" and answer["choices"][0]["finish_reason"]
        assert ask(second, prompt=f"without {number}")[0] == "hit"
    counted = second.http.get("/metrics").text
    assert 'qwen_jax_response_cache_requests_total{result="redis"} 1.0' in counted
