"""Tests of several live engines behind a load balancer: requests move while they wait and survive a dead engine."""
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import faulty_worker
import psutil
import pytest
from fake_engine import FakeEngine
from faulty_worker import DEVICE, FREEZE
from live import Live, quick_environment
from random_adapter import save_random_adapter
from served import PAGE_BYTES, SIZES

from qwen_jax.cluster.routing.gpu_assignment import environments
from qwen_jax.cluster.routing.load_balancer import LoadBalancer
from qwen_jax.cluster.routing.replica import PendingRequest, text_blocks
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import Answer, EngineClient, pieces
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import RequestOptions

# As `SIZES` has it: the same executables.
ENGINE = {"dtype": "float32", "max_batch_size": 8, "max_seq_len": 1024, "max_adapters": 2,
          "kv_cache_bytes": 15 * PAGE_BYTES, "progress": False}
ASK = {"model": "bundled", "prompt": "hello", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def options(number: int) -> RequestOptions:
    return RequestOptions(prompt=f"hello {number}", params={"max_tokens": 40, "temperature": 0.0, "ignore_eos": True},
                          arrived=time.monotonic())


async def text_of(answer: Answer) -> str:
    return "".join([piece.text async for some in pieces(answer) for piece in some])


def test_queues_even_out_and_every_request_is_answered_once(executable_cache):
    """All requests go to one engine; those that it has not begun move to the other."""
    async def run():
        make = lambda: EngineClient("bundled", ENGINE, 100, environment=quick_environment())  # noqa: E731
        balancer = LoadBalancer([make, make], 100, seed=0)
        await balancer.start()
        try:
            while not all(replica.alive for replica in balancer.replicas):
                assert not balancer.failure
                await asyncio.sleep(0.05)
            first, _ = balancer.replicas
            alone = []
            for number in range(3):
                answer = balancer.generate(options(number), 1)
                alone.append(await text_of(answer))
                balancer.close(answer)
            answers = []
            for number in range(40):
                answers.append(Answer(1))
                balancer._send(first, answers[-1], PendingRequest(options(number), ()))
            texts = await asyncio.gather(*map(text_of, answers))
            for answer in answers:
                balancer.close(answer)
            stats = [await replica.link.call("stats") for replica in balancer.replicas]
            return balancer, alone, texts, stats
        finally:
            await balancer.stop()

    balancer, alone, texts, stats = asyncio.run(run())
    assert texts[:3] == alone and len(texts) == 40 and balancer.requests == 0
    assert balancer.moved_requests >= 5
    assert [one["finished"] for one in stats] == [{"length": stats[0]["generated_tokens"] // 40},
                                                  {"length": stats[1]["generated_tokens"] // 40}]
    assert sum(one["generated_tokens"] for one in stats) == 43 * 40  # nothing was begun twice
    assert all(one["pages_used"] == 0 for one in stats)


@pytest.fixture(scope="module")
def pair(executable_cache, tmp_path_factory):
    live = Live(*SIZES, "--replicas", "2", "--max-requests", "200")
    yield live
    live.output()


def engines(pair) -> list[psutil.Process]:
    return psutil.Process(pair.process.pid).children()


def test_one_of_two_engines_is_killed_under_load(pair, tmp_path):
    save_random_adapter(tmp_path / "it")
    load = {"lora_name": "it", "lora_path": str(tmp_path / "it")}
    while pair.stats()["engine"]["running"] or len(pair.stats()["engine"]["engines"]) < 2:
        time.sleep(0.1)
    assert pair.post("/v1/load_lora_adapter", load).status_code == 200
    alone = {model: pair.post("/v1/completions", {**ASK, "model": model}).json()["choices"][0]["text"]
             for model in ("bundled", "it")}
    assert alone["bundled"] != alone["it"]
    with ThreadPoolExecutor(48) as threads:
        running = [threads.submit(pair.post, "/v1/completions", {**ASK, "model": ("bundled", "it")[number % 2]})
                   for number in range(48)]
        while pair.http.get("/metrics").text.count("num_requests_running{") < 2 or not pair.stats()["requests"] > 20:
            time.sleep(0.02)
        engines(pair)[0].kill()
        answers = [one.result() for one in running]
    assert [one.status_code for one in answers] == [200] * 48
    for number, answer in enumerate(answers):
        assert answer.json()["choices"][0]["text"] == alone[("bundled", "it")[number % 2]]
    end = time.monotonic() + 120
    while len(pair.stats()["engine"]["engines"]) < 2:
        assert time.monotonic() < end
        time.sleep(0.2)
    names = set(pair.stats()["engine"]["engines"])
    assert "engine-2" in names and pair.answers("/health")
    for _ in range(6):  # the new one has the adapter too
        assert pair.post("/v1/completions", {**ASK, "model": "it"}).json()["choices"][0]["text"] == alone["it"]
    pair.wait_until_free()


def test_a_stream_that_had_begun_ends_with_an_error_and_others_go_on(pair):
    with pair.http.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 900, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        for process in engines(pair):
            process.kill()
        assert any('"error"' in line for line in lines)
    end = time.monotonic() + 120
    while pair.post("/v1/completions", ASK).status_code != 200:
        assert time.monotonic() < end and pair.process.poll() is None
        time.sleep(0.2)


@pytest.mark.parametrize("poison", [DEVICE, pytest.param(FREEZE, marks=pytest.mark.slow)])
def test_a_request_that_ends_engines_is_not_passed_on_for_ever(executable_cache, poison):
    """A request that ends two of three engines gets an error, and other requests are answered by the third."""
    options = ("--replicas", "3", "--max-requests", "50", "--stall-seconds", "2")
    live = Live(*SIZES, *options, worker=str(Path(faulty_worker.__file__)))
    try:
        while len(live.stats()["engine"]["engines"]) < 3:
            time.sleep(0.1)
        alone = live.post("/v1/completions", ASK).json()["choices"][0]["text"]
        with ThreadPoolExecutor(12) as threads:
            others = [threads.submit(live.post, "/v1/completions", ASK) for _ in range(9)]
            poisoned = threads.submit(live.post, "/v1/completions", {**ASK, "prompt": poison})
            assert poisoned.result().status_code == 503
            answers = [one.result() for one in others]
        right = [one for one in answers if one.status_code == 200]
        # Requests that were with it on both engines get an error too: the server cannot tell them apart.
        assert {one.status_code for one in answers} <= {200, 503} and len(right) >= 3
        assert all(one.json()["choices"][0]["text"] == alone for one in right)
        assert live.post("/v1/completions", ASK).json()["choices"][0]["text"] == alone
        end = time.monotonic() + 120
        while len(live.stats()["engine"]["engines"]) < 3:
            assert time.monotonic() < end
            time.sleep(0.2)
        live.wait_until_free()
    finally:
        live.output()


@pytest.mark.parametrize("make", [
    lambda limit: LoadBalancer([FakeEngine, FakeEngine], limit, seed=0), lambda limit: EngineClient("m", {}, limit)],
    ids=["balancer", "client"])
def test_answers_are_counted_until_their_request_is_closed(make):
    link = make(8)
    link.check_alive = lambda: None
    link._writer = SimpleNamespace(write=lambda data: None)
    first, second = link.generate(options(0), 3), link.generate(options(1), 5)
    for count, status in ((1, 429), (9, 400)):
        with pytest.raises(ApiError) as error:
            link.generate(options(2), count)
        assert error.value.status == status
    assert link.requests == 2
    for _ in range(2):
        link.close(first)
    with pytest.raises(ApiError):
        link.generate(options(2), 4)
    third = link.generate(options(2), 3)
    link.close(second)
    link.close(third)
    assert link.open_answers.count == link.requests == 0


def test_blocks_of_text():
    long = "x" * 700
    assert len(text_blocks(long, None)) == 2 and text_blocks(long, None)[:1] == text_blocks(long[:256], None)
    assert text_blocks(long, None) != text_blocks(long, "adapter")
    assert text_blocks(long, None) != text_blocks(long, None, "salt")
    assert text_blocks("y" + long[1:], None)[1] != text_blocks(long, None)[1]
    assert text_blocks([1, 2, 3], None) == ()


def test_devices_of_engines(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert environments(2, 2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(UserError, match="replicas x tp_size must be at most"):
        environments(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environments(3, 2) == [{}, {}, {}]
