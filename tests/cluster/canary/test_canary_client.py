"""Tests of trials of adapters in a live server."""

import asyncio
import time

import httpx
import pytest
from fake_engine import FakeEngine
from live import Live, free_port
from random_adapter import save_random_adapter
from served import SIZES
from trial_traffic import ASK, until

from qwen_jax.cluster.canary.client import CanaryClient
from qwen_jax.cluster.canary.policy import PROMOTED, RUNNING, TAKEN_BACK, CanaryOptions
from qwen_jax.serving.ipc.messages import Piece, RequestOptions


@pytest.fixture
def pair(executable_cache, tmp_path):
    """A server with an adapter that changes nothing and one that changes everything, and its admin port."""
    keys = tmp_path / "keys"
    keys.write_text("admin")
    port = free_port()
    # Answers that a trial compares take room too, and on a busy machine they pile up.
    options = ("--admin-port", str(port), "--admin-keys", str(keys), "--response-cache-mb", "8",
               "--max-requests", "128")
    server = Live(*SIZES, *options)
    for name, scale in (("same", 0.0), ("other", 0.3)):
        save_random_adapter(tmp_path / name, scale=scale)
        loaded = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(tmp_path / name)})
        assert loaded.status_code == 200
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/admin", timeout=60,
                      headers={"Authorization": "Bearer admin"}) as admin:
        yield server, admin
    server.output()


def test_trials(pair, tmp_path):
    server, admin = pair
    text = {model: server.post("/v1/completions", {**ASK, "model": model}).json()["choices"][0]["text"]
            for model in ("bundled", "same", "other")}
    assert text["bundled"] == text["same"] != text["other"]
    assert admin.get("/canary").json() == {"state": "none"}
    assert admin.post("/canary", json={"adapter": "unknown"}).status_code == 404
    for wrong in ({"weights": [0.5, 0.1]}, {"weights": [2]}, {"requests": 0}, {"shadowed": -1}, {"colour": 1}):
        assert admin.post("/canary", json={"adapter": "same", **wrong}).status_code == 400

    # An adapter that answers otherwise is taken back, and only the users who got its answers have noticed.
    assert admin.post("/canary", json={"adapter": "other", "weights": [0.5, 1.0]}).status_code == 200
    assert admin.post("/canary", json={"adapter": "same"}).status_code == 409
    requests, found = until(admin, "taken back", server)
    assert "otherwise" in found["why"] and found["requests"] <= 60 and requests > 0
    assert server.post("/v1/completions", ASK).json()["choices"][0]["text"] == text["bundled"]

    # If it is meant to answer otherwise, a user who gets it keeps it, and the cache is not used.
    assert admin.post("/canary", json={"adapter": "other", "weights": [0.5], "requests": 10**6, "shadowed": 0}
                      ).status_code == 200
    seen = []
    for _ in range(2):
        got = {user: server.post("/v1/completions", {**ASK, "user": user}) for user in map(str, range(12))}
        assert all("x-cache" not in one.headers for one in got.values())
        texts = {user: one.json()["choices"][0]["text"] for user, one in got.items()}
        assert set(texts.values()) == {text["bundled"], text["other"]}
        seen.append(texts)
    assert seen[0] == seen[1]
    named = server.post("/v1/completions", {**ASK, "model": "same", "user": "0"}).json()["choices"][0]["text"]
    assert named == text["same"]  # a request that names an adapter is not part of the trial
    assert admin.delete("/canary").json()["state"] == "running" and admin.get("/canary").json() == {"state": "none"}

    # An adapter that changes nothing goes through all its shares, and then all users have it.
    assert admin.post("/canary", json={"adapter": "same", "weights": [0.5, 1.0], "requests": 5}).status_code == 200
    _, found = until(admin, "promoted", server, 80)
    assert found["tests"]["disagreed"]["happened"] == 0 and found["tests"]["failed"]["happened"] == 0
    answers = [server.post("/v1/completions", ASK) for _ in range(2)]
    assert [one.headers["x-cache"] for one in answers] == ["miss", "hit"]
    assert [one.json()["choices"][0]["text"] for one in answers] == [text["same"]] * 2

    # When the promoted adapter is unloaded, users get the model itself again.
    named = {**ASK, "model": "same"}
    assert [server.post("/v1/completions", named).headers["x-cache"] for _ in range(2)][1] == "hit"
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "same"}).status_code == 200
    found = admin.get("/canary").json()
    assert found["state"] == "taken back" and "not loaded" in found["why"]
    assert server.post("/v1/completions", ASK).json()["choices"][0]["text"] == text["bundled"]

    # Another adapter that is loaded under its name answers anew.
    replaced = {"lora_name": "same", "lora_path": str(tmp_path / "other")}
    assert server.post("/v1/load_lora_adapter", replaced).status_code == 200
    answers = [server.post("/v1/completions", named) for _ in range(2)]
    assert [one.headers["x-cache"] for one in answers] == ["miss", "hit"]
    assert [one.json()["choices"][0]["text"] for one in answers] == [text["other"]] * 2
    figures = server.wait_until_free()
    assert figures["compiles_after_warmup"] == 0
    for name in ("same", "other"):
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 1.0)])
@pytest.mark.parametrize("promoted", [False, True])
def test_a_missing_adapter_ends_a_trial(weights, promoted):
    """The engine says that the adapter is not loaded, as after a race with its unloading."""
    class WithoutAdapters(FakeEngine):
        def _end(self, answer):
            named = self.asked[answer.number].adapter
            answer.put(Piece(0, 0, finish_reason="error", error="no adapter", kind="adapter") if named else
                       Piece(0, 0, "text", [1], finish_reason="length"))

        def generate(self, options, answers):
            answer = super().generate(options, answers)
            answer.number = len(self.asked) - 1
            return answer

    async def work():
        client = CanaryClient(WithoutAdapters(max_requests=100))
        client.try_adapter("it", CanaryOptions(weights=weights))
        if promoted:
            client.canary.state = PROMOTED
        for number in range(8):
            client.generate(RequestOptions(prompt=f"{number}", arrived=time.monotonic()), 1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return client.canary, [options.adapter for options in client._link.asked]

    canary, adapters = asyncio.run(work())
    assert canary.state == TAKEN_BACK and "not loaded" in canary.why
    assert adapters.count("it") == 1 and adapters[-1] is None
    assert promoted or canary.tests["failed"].happened == 1


def test_a_trial_ends_before_its_adapter_is_unloaded():
    async def work():
        states = []
        client = CanaryClient(link := FakeEngine())
        client.try_adapter("it", CanaryOptions())
        link.calls["unload_adapter"] = lambda name: states.append((name, client.canary.state))
        await client.call("unload_adapter", "another")
        await client.call("unload_adapter", "it")
        return states

    assert asyncio.run(work()) == [("another", RUNNING), ("it", TAKEN_BACK)]
