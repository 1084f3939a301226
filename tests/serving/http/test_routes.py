"""Tests of routes in front of a stand-in for the engine: who may do what, limits, metrics, unhandled exceptions."""

import asyncio
import json
import os
import time
from types import SimpleNamespace

import httpx
import pytest
from fake_engine import FakeEngine

from qwen_jax.serving.http import monitoring_routes
from qwen_jax.serving.options import ServerOptions
from qwen_jax.serving.server import assemble

ASK = {"model": "m", "prompt": "hello", "max_tokens": 1}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def keys(tmp_path):
    """Options with the files of two API keys, "one" and "two", and of an admin key, "admin"."""
    (tmp_path / "keys").write_text("one\ntwo\n")
    (tmp_path / "admin").write_text("admin\n")
    return {"api_keys": str(tmp_path / "keys"), "admin_keys": str(tmp_path / "admin")}


@pytest.fixture
def adapters(tmp_path):
    """A folder with the folder of an adapter, and beside it another adapter."""
    for folder in (tmp_path / "adapters" / "it", tmp_path / "outside"):
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_text("{}")
    return tmp_path / "adapters"


def ask(*requests, link=None, **options):
    """Send requests, each of (path, body, key), one after another, and return the responses."""
    app = assemble(link or FakeEngine(), "m", ServerOptions(**options)).public

    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return [await http.post(path, content=json.dumps(body), headers={
                "Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})})
                    for path, body, key in requests]

    return asyncio.run(send())


def statuses(*requests, **options):
    return [answer.status_code for answer in ask(*requests, **options)]


def test_adapters_belong_to_the_admin_key_or_to_everybody(keys, adapters):
    load, unload = (LOAD, {"lora_name": "a", "lora_path": "it"}), (UNLOAD, {"lora_name": "a"})
    options = {"adapter_dir": str(adapters)}
    assert statuses((*load, "one"), (*load, "admin"), (*unload, "two"), (*unload, "admin"), (*load, "x"), **keys,
                    **options) == [403, 200, 403, 200, 401]
    assert statuses((*load, None), (*unload, None), **options) == [403, 403]
    assert statuses((*load, "one"), (*unload, "two"), **keys, **options, public_adapters=True) == [200, 200]
    answer, = ask((*load, "one"), **keys, **options)
    assert "--public-adapters" in answer.json()["error"]["message"]
    assert statuses(("/v1/completions", ASK, "admin"), **keys) == [200]


def test_adapters_are_loaded_from_their_folder_alone(adapters):
    (adapters / "link").symlink_to(adapters.parent / "outside")
    (adapters / "linked").mkdir()
    (adapters / "piped").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapters / "linked" / name).symlink_to(adapters.parent / "outside" / name)
        os.mkfifo(adapters / "piped" / name)
    (adapters / "circle").symlink_to("circle")
    wrong = ["/usr", "/etc/passwd", "../outside", str(adapters.parent / "outside"), "link", "linked", "piped", "circle",
             "none", ".", "it/../../outside", "x" * 300, "x/" * 2000, "x" * 5000, "a\0b", "\ud800", ""]
    loaded, link = [], FakeEngine()
    link.calls["load_adapter"] = lambda name, folder: loaded.append(folder)
    began = time.monotonic()
    for answer in ask(*((LOAD, {"lora_name": "a", "lora_path": path}, None) for path in wrong), link=link,
                      public_adapters=True, adapter_dir=str(adapters)):
        assert answer.status_code == 400 and "lora_path" in answer.json()["error"]["message"], answer.text
    assert time.monotonic() - began < 5 and not loaded
    right = ("it", str(adapters / "it"), "./it/")
    assert statuses(*((LOAD, {"lora_name": "a", "lora_path": path}, None) for path in right), link=link,
                    public_adapters=True, adapter_dir=str(adapters)) == [200] * 3
    usr, off = (LOAD, {"lora_name": "a", "lora_path": "/usr"}, None), FakeEngine(max_adapters=0)
    for options, engine, said in (({}, link, "--adapter-dir"), ({"adapter_dir": "/"}, off, "--max-adapters")):
        answer, = ask(usr, link=engine, public_adapters=True, **options)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_answers_are_counted_not_prompts():
    link = FakeEngine(max_requests=16)
    many = {**ASK, "prompt": ["a"] * 1000, "n": 128}
    for body in (many, {**ASK, "n": 17}, {**ASK, "prompt": ["a"] * 5, "n": 4}, {**ASK, "prompt": ["a"] * 17}):
        answer, = ask(("/v1/completions", body, None), link=link)
        assert answer.status_code == 400 and "--max-requests" in answer.json()["error"]["message"]
    assert not link.asked and link.requests == 0
    for body in ({**ASK, "n": 16}, {**ASK, "prompt": ["a"] * 4, "n": 4}):
        assert statuses(("/v1/completions", body, None), link=link) == [200]
    assert link.most == 16 and link.requests == 0
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    assert statuses(*(("/v1/chat/completions", {**chat, "n": n}, None) for n in (16, 17)), link=link) == [200, 400]
    link.open_answers.add("another", 13)
    assert statuses(*(("/v1/chat/completions", {**chat, "n": n}, None) for n in (3, 4)), link=link) == [200, 429]
    assert statuses(("/v1/completions", {**ASK, "n": 4}, None), ("/v1/completions", {**ASK, "n": 3}, None),
                    link=link) == [429, 200]


def test_as_many_inputs_as_are_documented_run_on_an_idle_server():
    link = FakeEngine(max_requests=16)
    inputs = {"model": "m", "input": ["a"] * 2048}
    answer, = ask(("/v1/embeddings", inputs, None), link=link)
    assert answer.status_code == 200 and len(answer.json()["data"]) == len(link.asked) == 2048 and link.most == 16
    link.open_answers.add("others", 15)  # one at a time, then
    assert statuses(("/v1/embeddings", {**inputs, "input": ["a"] * 20}, None), link=link) == [200]
    link.open_answers.add("one more", 1)
    assert statuses(("/v1/embeddings", {**inputs, "input": ["a"]}, None), link=link) == [429]
    link = FakeEngine(max_requests=1024)
    assert statuses(("/v1/embeddings", inputs, None), link=link) == [200] and link.most == 256


def test_a_priority_below_the_bound_needs_an_admin_key(keys):
    asked = [("/v1/completions", {**ASK, "priority": priority}, key)
             for priority, key in ((-1, "one"), (0, "one"), (-1, "admin"))]
    assert statuses(*asked, **keys, min_priority=0) == [403, 200, 200]
    assert statuses(*asked, **keys) == [200, 200, 200]
    embed = "/v1/embeddings", {"model": "m", "input": "a", "priority": -5}, "two"
    answer, = ask(embed, **keys, min_priority=-4)
    assert answer.status_code == 403 and answer.json()["error"]["param"] == "priority"


def test_prefix_caches_are_separate_by_salt_and_by_key(keys):
    bodies = [ASK, {**ASK, "cache_salt": "a"}]
    asked = [("/v1/completions", body, key) for key in ("one", "two") for body in bodies]
    asked.append(("/v1/embeddings", {"model": "m", "input": "a", "cache_salt": "a"}, "one"))
    link = FakeEngine()
    assert statuses(*asked, link=link, **keys) == [200] * 5
    assert [options.cache_salt for options in link.asked] == ["", "a", "", "a", "a"]
    link = FakeEngine()
    assert statuses(*asked, link=link, **keys, salt_by_key=True) == [200] * 5
    first, salted, *others, embedded = [options.cache_salt for options in link.asked]
    assert len({first, salted, *others}) == 4 and embedded == salted and "one" not in first
    for salt in ("", "x" * 257, 5):
        assert statuses(("/v1/completions", {**ASK, "cache_salt": salt}, None)) == [400]


def test_an_exception_is_an_error_with_the_request_s_id_and_counted(caplog):
    link = FakeEngine()
    link.calls["stats"] = lambda: 1 / 0
    app = assemble(link, "m", ServerOptions()).public

    async def work():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return (await http.get("/stats", headers={"X-Request-Id": "mine"}), await http.get("/metrics"))

    answer, metrics = asyncio.run(work())
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"
    error = answer.json()["error"]
    assert error["type"] == "server_error" and "mine" in error["message"] and "Zero" not in error["message"]
    assert 'http_requests_total{route="/stats",status="500"} 1.0' in metrics.text
    assert "request mine failed" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_body_that_is_nested_too_deeply_is_refused():
    schema = {}
    for _ in range(450):
        schema = {"properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    answer, = ask(("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "a"}],
                                            "tools": tools, "tool_choice": "required"}, None))
    assert answer.status_code == 400 and "less deeply" in answer.json()["error"]["message"]


def test_metrics_are_made_once_in_a_while_for_all(monkeypatch):
    clock, made, link = [100.0], [], FakeEngine()
    monkeypatch.setattr(monitoring_routes, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    link.calls["metrics"] = lambda: made.append(clock[0]) or b"figure 1\n"
    app = assemble(link, "m", ServerOptions()).public

    async def work():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            for clock[0] in (100.0, 100.5, 100.99, 101.0, 101.5, 103.0):
                answers = await asyncio.gather(*(http.get("/metrics") for _ in range(10)))
                assert all(answer.text.endswith("figure 1\n") for answer in answers)

    asyncio.run(work())
    assert made == [100.0, 101.0, 103.0]


def test_the_scheme_of_a_key_has_any_case(keys):
    app = assemble(FakeEngine(), "m", ServerOptions(**keys)).public

    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return [(await http.get("/v1/models", headers={"Authorization": header})).status_code
                    for header in ("bearer one", "BEARER  one ", "Bearer one", "one", "Basic one", "bearer three")]

    assert asyncio.run(send()) == [200, 200, 200, 200, 401, 401]


def test_pages_of_other_origins_may_read_answers_where_the_option_says_so(keys):
    async def send(**options):
        app = assemble(FakeEngine(), "m", ServerOptions(**keys, **options)).public
        asking = {"Origin": "https://there", "Access-Control-Request-Method": "POST",
                  "Access-Control-Request-Headers": "authorization"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            before = await http.options("/v1/chat/completions", headers=asking)
            refused = await http.get("/v1/models", headers={"Origin": "https://there"})  # also errors can be read
            return before, refused

    allowed = "access-control-allow-origin"
    before, refused = asyncio.run(send(cors_origin="https://here, https://there"))
    assert before.status_code == 200 and before.headers[allowed] == refused.headers[allowed] == "https://there"
    assert refused.status_code == 401
    for options in ({}, {"cors_origin": "https://here"}):
        assert not [one for one in asyncio.run(send(**options)) if allowed in one.headers]
