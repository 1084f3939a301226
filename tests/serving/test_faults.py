"""Mistakes of clients, and faults in the processes of live servers."""
import asyncio
import http.client
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import httpx
import psutil
import pytest
from faulty_worker import DEVICE, FREEZE, TEXT
from random_adapter import save_random_adapter

OK = {"model": "bundled", "prompt": "hello", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "bundled", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
LONG = {"model": "bundled", "prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


@pytest.fixture(autouse=True)
def still_answers(server):
    """Check after every test that the server still answers."""
    yield
    assert server.post("/v1/completions", OK).status_code == 200


@pytest.mark.parametrize("content", [b"{bad", b"[]", b"null", b"3", b'"x"', b"", b"\xff\xfe", b"{" * 5000])
def test_what_is_no_json_object(server, content):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/load_lora_adapter"):
        answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("change, status, said", [
    ({"model": "other"}, 404, "does not exist"),
    ({"model": 3}, 400, "model"),
    ({"prompt": "a " * 1200}, 400, "max_seq_len"),
    ({"prompt": "a " * 1_500_000}, 400, "bytes, more than max_seq_len"),
    ({"prompt": ["a", *["a " * 200_000] * 9]}, 400, "bytes, more than max_seq_len"),
    ({"prompt": [5] * 1000}, 400, "pages of KV cache"),
    ({"prompt": ""}, 400, "empty"), ({"prompt": []}, 400, "empty"), ({"prompt": [""]}, 400, "empty"),
    ({"prompt": [[]]}, 400, "empty"),
    ({"n": 10**9, "temperature": 1}, 400, "n"), ({"n": 0}, 400, "n"),
    ({"logprobs": 21}, 400, "logprobs"), ({"logprobs": -1}, 400, "logprobs"),
    ({"guided_regex": "(("}, 400, "regex"), ({"guided_json": {"type": 3}}, 400, "json_schema"),
    ({"guided_grammar": "start: ["}, 400, "grammar"), ({"guided_choice": []}, 400, "choice"),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"temperature": -1}, 400, "temperature"), ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": -0.1}, 400, "top_p"), ({"top_k": -5}, 400, "top_k"), ({"min_p": 2}, 400, "min_p"),
    ({"seed": 2**70}, 400, "seed"), ({"presence_penalty": 9}, 400, "presence_penalty"),
    ({"prompt": [10**6]}, 400, "vocabulary"), ({"prompt": [-1]}, 400, "vocabulary"),
    ({"guided_regex": "zq", "stop_token_ids": [89], "min_tokens": 2}, 400, "min_tokens=2"),
    ({"guided_regex": "zq", "stop_token_ids": [80], "min_tokens": 2}, 400, "min_tokens=2"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"), ({"logit_bias": {"99999": 1}}, 400, "vocabulary"),
    ({"stop": ["x"] * 99}, 400, "stop"), ({"stop": "x" * 200_000}, 400, "1024 characters"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"), ({"max_tokens": 10**30}, 400, "value"),
    ({"timeout": 0}, 400, "timeout"), ({"priority": 1.5}, 400, "priority"), ({"priority": 2**80}, 400, "priority"),
    ({"stream_options": {"include_usage": True}}, 400, "stream"), ({"best_of": 3}, 400, "best_of"),
    ({"colour": "red"}, 400, "colour"), ({"chat_template": "{{ 1 }}"}, 400, "chat template"),
])
def test_fields_that_cannot_be(server, change, status, said):
    for stream in (False, True):
        answer = server.post("/v1/completions", {**OK, **change, **({"stream": True} if stream else {})})
        if stream and "stream_options" in change:
            continue
        assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text


def test_numbers_that_are_none(server):
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = json.dumps(OK).replace('"temperature": 0', f'"temperature": {text}')
        assert text in body
        answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400


@pytest.mark.parametrize("change", [
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": "hello"}, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, {"tool_choice": "maybe"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}], "tool_choice": "required"},
    {"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "g"}}},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required",
     "response_format": {"type": "json_object"}},
    {"top_logprobs": 3}, {"chat_template": "x"},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}]},
    {"messages": [{"role": "user", "content": "half \ud800"}]}])
def test_chats_that_cannot_be(server, change):
    body = json.dumps({**CHAT, **change})  # in which half a surrogate pair is escaped
    headers = {"content-type": "application/json"}
    assert server.http.post("/v1/chat/completions", content=body, headers=headers).status_code == 400


def test_a_flood_of_schemas(server):
    def ask(number):
        schema = {"type": "object", "properties": {f"p{number}": {"type": "string", "maxLength": 1}}}
        return server.post("/v1/completions", {**OK, "guided_json": schema}).status_code

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(200))) == {200}


CHAIN = {"$ref": "#/$defs/d0", "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)},
                                         "d3000": {"type": "integer"}}}
ALL_OF = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i % 26)}.*"} for i in range(28)]}
DEEP = json.loads('{"items":' * 500 + "{}" + "}" * 500)
RULES = "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(4000)), 'r4000: "a"'])


@pytest.mark.parametrize("fields", [
    {"guided_json": CHAIN}, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CHAIN}}},
    {"guided_grammar": RULES}, {"guided_json": ALL_OF}, {"guided_choice": [f"option {i}" for i in range(50_000)]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": CHAIN}}], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": ALL_OF}}], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, {"guided_json": DEEP},
    {"guided_grammar": 'start: "a" rest\nrest: rest "b"'},  # found when the answer cannot go on
], ids=range(10))
def test_grammars_that_would_end_or_freeze_the_engine(server, fields):
    with ThreadPoolExecutor(4) as threads:
        hostile = [threads.submit(server.post, "/v1/chat/completions", {**CHAT, **fields}) for _ in range(3)]
        began = time.monotonic()
        assert server.post("/v1/completions", OK).status_code == 200
        assert time.monotonic() - began < 6  # other tests run beside: scripts/bench/hostile.py measures
        assert [(answer.result().status_code, answer.result().json()["error"]["type"]) for answer in hostile] == [
            (400, "invalid_request_error")] * 3


def test_bodies_and_headers_that_are_too_large(server):
    large = server.post("/v1/completions", {**OK, "user": "x" * (5 << 20)})
    assert large.status_code == 413
    def parts():
        for _ in range(80):
            yield b"x" * (1 << 16)
    assert server.http.post("/v1/completions", content=parts()).status_code == 413  # without a length beforehand
    assert server.post("/v1/completions", OK, headers={"X-Large": "x" * 20000}).status_code == 431
    assert server.http.get("/v1/models?" + "x" * 20000).status_code == 431


@pytest.mark.parametrize("begin, part", [
    ("GET /health HTTP/1.1\r\nhost: x\r\nx-large: ", "x" * 65536),
    ("GET /health HTTP/1.1\r\nhost: x\r\n", "x-many: y\r\n" * 5000),
    ("GET /health?", "x" * 65536),
    ("POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
     "x-trailer: y\r\n" * 5000),
    ("POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2;x=", "x" * 65536)],
    ids=["header", "headers", "address", "trailers", "extension"])
def test_a_request_without_an_end_is_refused(server, begin, part):
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(begin.encode())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < 64 << 20:
                client.sendall(part.encode())
                sent += len(part)
        if "chunked" not in begin:
            assert client.recv(1000).startswith(b"HTTP/1.1 431 ")


def test_a_websocket_is_not_opened(server):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert server.http.get("/v1/models", headers=headers).json()["object"] == "list"


def test_a_server_has_as_many_connections_as_the_system_allows(server):
    few, most = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert few == most


@pytest.mark.parametrize("change", [{"model": "m" * 100_000}, {"f" * 100_000: 1}, {"logit_bias": {"\0" * 100_000: 1}},
                                    {"stop": ["s"] * 50_000 + [3]}])
def test_an_error_does_not_repeat_the_whole_request(server, change):
    answer = server.post("/v1/completions", {**OK, **change})
    assert answer.status_code in (400, 404) and len(answer.content) < 8000 and answer.json()["error"]["message"]


@pytest.mark.parametrize("path, change", [
    ("/v1/completions", {"prompt": [1.5] * 300_000}), ("/v1/completions", {"stop": [{}] * 500_000}),
    ("/v1/completions", {"logit_bias": dict.fromkeys(range(200_000))}),
    ("/v1/chat/completions", {"tools": [[]] * 500_000}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 500_000}]}),
    ("/v1/chat/completions", {"messages": [dict.fromkeys(range(300_000))]})], ids=range(6))
def test_a_body_of_wrong_parts_is_refused_without_a_list_of_all_of_them(server, path, change):
    answer = server.post(path, {**(OK if path == "/v1/completions" else CHAT), **change})
    assert answer.status_code == 400
    memory = psutil.Process(server.process.pid).memory_info().rss
    assert memory < 600 << 20


def test_answers_are_counted_and_inputs_wait_for_room(server):
    many = server.post("/v1/completions", {**OK, "prompt": ["hello"] * 5, "n": 4, "temperature": 1})
    assert many.status_code == 400 and "--max-requests" in many.text
    embedded = server.post("/v1/embeddings", {"model": "bundled", "input": ["hello"] * 40})
    assert embedded.status_code == 200 and len(embedded.json()["data"]) == 40


def test_scrapers_without_a_pause_hold_up_no_answer(server):
    async def load():
        async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as http:
            async def scrape(path):
                while True:
                    async with http.get(path) as answer:
                        await answer.read()

            scrapers = [asyncio.create_task(scrape(path)) for path in ["/metrics"] * 40 + ["/stats", "/ready"] * 5]
            await asyncio.sleep(0.3)
            began = time.monotonic()
            async with http.post("/v1/completions", json={**LONG, "max_tokens": 40}) as answer:
                status = answer.status
                await answer.read()
            seconds = time.monotonic() - began
            for scraper in scrapers:
                scraper.cancel()
            return status, seconds

    status, seconds = asyncio.run(load())
    assert status == 200 and seconds < 2


def test_a_salt_separates_the_prefix_cache(server):
    def hits(salt):
        before = server.wait_until_free()["prefix_hits"]
        ask = {**OK, "prompt": [(3 * place) % 500 + 5 for place in range(130)], "max_tokens": 1, "cache_salt": salt}
        assert server.post("/v1/completions", ask).status_code == 200
        return server.wait_until_free()["prefix_hits"] - before

    assert [hits(salt) for salt in ("first", "first", "second", "second")] == [0, 2, 0, 2]


def test_a_client_that_leaves_frees_its_pages(server):
    before = server.wait_until_free()["finished"].get("abort", 0)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        next(answer.iter_lines())
    server.wait_until_free()
    leaving = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    leaving.request("POST", "/v1/completions", json.dumps({**LONG, "max_tokens": 500}),
                    {"Content-Type": "application/json"})
    end = time.monotonic() + 20
    while not server.stats()["engine"]["pages_used"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    leaving.close()
    assert server.wait_until_free()["finished"]["abort"] == before + 2


def test_a_burst_beyond_what_is_taken(server):
    def ask(_):
        return server.post("/v1/completions", {**LONG, "max_tokens": 60})

    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(ask, range(160)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429} and len(refused) > 40
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert len({answer.text.split('"text":')[1] for answer in answers if answer.status_code == 200}) == 1
    server.wait_until_free()


def test_a_deadline_that_passes_in_the_queue(server):
    with ThreadPoolExecutor(12) as threads:
        running = [threads.submit(server.post, "/v1/completions", LONG) for _ in range(8)]
        time.sleep(0.1)
        late = server.post("/v1/completions", {**LONG, "timeout": 0.01})
        assert late.status_code == 408 and late.json()["error"]["type"] == "timeout_error"
        assert all(answer.result().status_code == 200 for answer in running)


def test_a_slow_reader_holds_up_no_other(server):
    slow = socket.create_connection(("127.0.0.1", server.port))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    body = json.dumps({**LONG, "stream": True, "n": 8, "temperature": 1, "logprobs": 20}).encode()
    slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
                 + str(len(body)).encode() + b"\r\n\r\n" + body)
    for _ in range(3):
        assert server.post("/v1/completions", OK).status_code == 200
    slow.close()
    server.wait_until_free()


def test_more_than_fits_is_preempted_and_says_the_same(server):
    """Eight answers of three pages each with their prompts, in fifteen pages."""
    ask = {**LONG, "prompt": "a longer prompt " * 10, "max_tokens": 150}
    alone = server.post("/v1/completions", ask).json()["choices"][0]["text"]
    before = server.stats()["engine"]["preemptions"]
    with ThreadPoolExecutor(8) as threads:
        texts = [answer.json()["choices"][0]["text"] for answer in threads.map(
            lambda _: server.post("/v1/completions", ask), range(8))]
    assert texts == [alone] * 8
    assert server.wait_until_free()["preemptions"] > before


def test_adapters_loaded_and_unloaded_while_they_are_used(server, tmp_path):
    """A request runs with its adapter or is refused; the server lives, and nothing is held in the end."""
    save_random_adapter(tmp_path / "it")
    load = {"lora_name": "race", "lora_path": str(tmp_path / "it")}

    def cycle(_):
        return [server.post("/v1/load_lora_adapter", load).status_code,
                server.post("/v1/unload_lora_adapter", {"lora_name": "race"}).status_code]

    def ask(_):
        return server.post("/v1/completions", {**OK, "model": "race"})

    with ThreadPoolExecutor(6) as threads:
        cycles = [threads.submit(cycle, number) for number in range(12)]
        asked = [threads.submit(ask, number) for number in range(40)]
    assert {code for cycle in cycles for code in cycle.result()} <= {200, 400, 404}
    answers = [future.result() for future in asked]
    assert {answer.status_code for answer in answers} <= {200, 404, 429}
    assert len({answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}) <= 1
    server.post("/v1/unload_lora_adapter", {"lora_name": "race"})
    assert "race" not in server.wait_until_free()["adapters"]


def test_adapters_that_cannot_be_loaded(server, tmp_path):
    load = lambda **body: server.post("/v1/load_lora_adapter", body)  # noqa: E731
    assert load(lora_name="a", lora_path=str(tmp_path)).status_code == 400
    for path in ("/usr", "/tmp/../usr", "x" * 5000, "a\0b"):
        began = time.monotonic()
        assert load(lora_name="a", lora_path=path).status_code == 400 and time.monotonic() - began < 5
    assert load(lora_name="a").status_code == 400 and load(lora_name="bundled", lora_path="x").status_code == 400
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "a"}).status_code == 404


@pytest.mark.parametrize("change", [{"target_modules": 5}, {"target_modules": "[("}, {"lora_alpha": float("inf")},
                                    {"lora_alpha": 10**400}, {"r": -4}, {"r": -4, "use_rslora": True}])
def test_settings_of_an_adapter_that_cannot_be(server, tmp_path, change):
    save_random_adapter(tmp_path / "a")
    settings = tmp_path / "a" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **change}))
    answer = server.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": str(tmp_path / "a")})
    assert answer.status_code == 400 and " must be " in answer.json()["error"]["message"]


# --- processes of their own


def test_keys(own, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    server = own("--api-keys", str(keys), wait=False)
    while not server.answers("/health"):
        time.sleep(0.05)
    for key, known in (("second", True), ("third", False), ("", False), ("sécond", False)):
        answer = server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}".strip().encode()})
        assert answer.status_code == (200 if known else 401)
    assert server.http.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert "second" not in server.output()


def test_one_request_that_raises_and_a_device_that_fails(own):
    server = own(worker=str(Path(__file__).with_name("faulty_worker.py")))
    assert server.post("/v1/completions", {**OK, "prompt": TEXT}).status_code == 500
    assert server.post("/v1/completions", OK).status_code == 200
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(server.post, "/v1/completions", LONG) for _ in range(3)]
        time.sleep(0.1)
        failed = server.post("/v1/completions", {**OK, "prompt": DEVICE})
        assert failed.status_code == 503 and "the device is gone" in failed.json()["error"]["message"]
        assert {other.result().status_code for other in others} <= {200, 503}
    assert server.process.wait(20) not in (0, None)


def test_a_frozen_loop(own):
    server = own("--stall-seconds", "1", worker=str(Path(__file__).with_name("faulty_worker.py")))
    assert server.answers("/health")
    threading.Thread(target=lambda: httpx.post(f"{server.url}/v1/completions", json={**OK, "prompt": FREEZE}),
                     daemon=True).start()
    end = time.monotonic() + 20
    while server.answers("/health"):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not server.answers("/ready")


def test_sigterm_under_load(own):
    server = own()
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(server.post, "/v1/completions", LONG) for _ in range(8)]
        while server.stats()["requests"] < 8:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        refused = server.post("/v1/completions", OK)
        assert refused.status_code == 503 and "draining" in refused.text and not server.answers("/ready")
        assert [answer.result().status_code for answer in running] == [200] * 8
    assert server.process.wait(20) == 0


def test_sigkill_and_back_from_the_disk(own):
    server = own()
    server.process.kill()
    began = time.monotonic()
    again = own()
    assert time.monotonic() - began < 20  # 10 s are measured by scripts/bench, on a quiet machine
    assert again.post("/v1/completions", OK).status_code == 200


def test_an_engine_that_cannot_be_made(own):
    server = own("--max-seq-len", "999999", wait=False)
    assert server.process.wait(60) == 2
    printed = server.output()
    assert "qwen-jax: max_seq_len=999999 exceeds" in printed and "Traceback" not in printed
