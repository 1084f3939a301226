"""Tests of engines that come, go, are replaced or try other weights, while requests flow."""
import asyncio
import contextlib
import shutil
import time
from collections import Counter

import numpy as np
import pytest
from live import Live, free_port, quick_environment
from served import PAGE_BYTES, SIZES
from trial_traffic import asked, until

from qwen_jax.checkpoint.source import SHIPPED
from qwen_jax.cluster.canary.client import CanaryClient
from qwen_jax.cluster.canary.policy import PROMOTED, RUNNING, TAKEN_BACK, CanaryOptions
from qwen_jax.cluster.routing.load_balancer import LoadBalancer
from qwen_jax.cluster.routing.replica_set import begin_trial, end_trial, replace_all, resize
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import EngineClient, pieces
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import RequestOptions

# As `SIZES` has it: the same executables.
ENGINE = {"dtype": "float32", "max_batch_size": 8, "max_seq_len": 1024, "max_adapters": 2,
          "kv_cache_bytes": 15 * PAGE_BYTES, "progress": False}
UPDATE = "finish_old", None


def make(model="bundled", **options):
    return lambda: EngineClient(str(model), {**ENGINE, **options}, 200, environment=quick_environment())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with other weights of the same architecture."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("weights") / "other"
    shutil.copytree(SHIPPED["bundled"], folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, value in tensors.items():
        if value.ndim == 2:
            tensors[name] = (value.astype(np.float32) + .02 * rng.normal(size=value.shape)).astype(value.dtype)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


async def ask(link, number=0, **more) -> str:
    options = RequestOptions(prompt=f"hello {number % 3}", arrived=time.monotonic(),
                             params={"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}, **more)
    answer = link.generate(options, 1)
    try:
        return "".join([piece.text async for some in pieces(answer) for piece in some])
    finally:
        link.close(answer)


async def until_ready(balancer, count):
    while sum(replica.alive for replica in balancer.replicas) != count or len(balancer.replicas) != count:
        assert not balancer.failure
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def traffic(link):
    """Run twelve callers who ask again after a pause, which a starting engine needs; yield a counter of answers."""
    told: Counter = Counter()
    ended = asyncio.Event()

    async def caller(number):
        while not ended.is_set():
            await asyncio.sleep(0.1)
            try:
                told[number % 3, await ask(link, number)] += 1
            except ApiError as error:
                told["failed", str(error)] += 1

    callers = [asyncio.create_task(caller(number)) for number in range(12)]
    yield told
    ended.set()
    await asyncio.gather(*callers)


@contextlib.asynccontextmanager
async def running(*makers):
    balancer = LoadBalancer(makers, 200, seed=0)
    await balancer.start()
    try:
        await until_ready(balancer, len(makers))
        yield balancer
    finally:
        await balancer.stop()


def test_engines_come_and_go_and_are_replaced_under_load(executable_cache):
    async def run():
        async with running(make()) as balancer:
            right = {(number, await ask(balancer, number)) for number in range(3)}
            async with traffic(balancer) as told:
                await resize(balancer, 2, make(), 60)
                await until_ready(balancer, 2)
                second = balancer.replicas[1]
                while not second.pending:
                    await asyncio.sleep(0.01)
                successor = make()
                await replace_all(balancer, successor, True, 60)
                assert second not in balancer.replicas and len(balancer.replicas) == 2
                assert [replica.make_link for replica in balancer.replicas] == [successor] * 2
                with pytest.raises(UserError, match="nowhere"):
                    await replace_all(balancer, make("nowhere"), True, 60)
                assert len(balancer.replicas) == 2 and all(replica.alive for replica in balancer.replicas)
                await resize(balancer, 1, make(), 60)
                assert len(balancer.replicas) == 1
                with pytest.raises(UserError, match="last engine"):
                    await replace_all(balancer, make(), False, 60)
                assert balancer.replicas[0].alive
            assert balancer.requests == 0
            return right, told

    right, told = asyncio.run(run())
    assert set(told) == right and sum(told.values()) > 100


def test_an_engine_that_ends_while_it_retires_takes_no_answer_with_it(executable_cache):
    async def run():
        async with running(make(), make()) as balancer:
            right = {(number, await ask(balancer, number)) for number in range(3)}
            async with traffic(balancer) as told:
                await asyncio.sleep(0.5)
                leaving = balancer.replicas[0]
                retiring = asyncio.create_task(balancer.retire(leaving, 60))
                leaving.link.kill()
                await retiring
                assert leaving not in balancer.replicas and len(balancer.replicas) == 1
                await asyncio.sleep(0.5)
            return right, told

    right, told = asyncio.run(run())
    assert set(told) == right


def test_going_back_to_weights_that_an_engine_never_had(executable_cache, other):
    """An engine that came after the update has no previous weights of its own."""
    async def run():
        async with running(make()) as balancer:
            before = await ask(balancer)
            with pytest.raises(UserError, match="no other version"):
                await balancer.call("rollback")
            await balancer.call("update_weights", other, *UPDATE)
            after = await ask(balancer)
            await resize(balancer, 2, make(), 60)
            await until_ready(balancer, 2)
            assert [replica.has_previous for replica in balancer.replicas] == [True, False]
            texts = []
            for _ in range(3):
                await balancer.call("rollback")
                texts.append([await ask(replica.link) for replica in balancer.replicas])
            return before, after, texts

    before, after, texts = asyncio.run(run())
    assert before != after and texts == [[before] * 2, [after] * 2, [before] * 2]


def test_weights_are_tried_by_one_engine(executable_cache, other):
    async def run():
        async with running(make(), make()) as balancer:
            before = await ask(balancer)
            with pytest.raises(UserError, match="nowhere"):
                await begin_trial(balancer, ("nowhere", *UPDATE), 60)
            assert all(replica.alive and not replica.on_trial for replica in balancer.replicas)
            async with traffic(balancer) as told:
                tried = await begin_trial(balancer, (other, *UPDATE), 60)
                after = await ask(balancer, on_trial=True)
                with pytest.raises(ApiError, match="on trial"):
                    await balancer.call("update_weights", other, *UPDATE)
                await end_trial(balancer, None)  # taken back
                assert await ask(balancer, on_trial=True) == await ask(tried.link) == before
            assert {text for number, text in told if number == 0} == {before}
            assert not any(number == "failed" for number, _ in told)
            tried = await begin_trial(balancer, (other, *UPDATE), 60)
            await end_trial(balancer, (other, *UPDATE))  # all have it
            assert [await ask(replica.link) for replica in balancer.replicas] == [after] * 2
            await balancer.call("rollback")
            assert [await ask(replica.link) for replica in balancer.replicas] == [before] * 2
            # Weights that one of them refuses, none has.
            tried = await begin_trial(balancer, (other, *UPDATE), 60)
            with pytest.raises(UserError):
                await end_trial(balancer, ("nowhere", *UPDATE))
            assert [await ask(replica.link) for replica in balancer.replicas] == [before] * 2
            # Its engine dies: the trial is over, since no engine has the weights.
            link = CanaryClient(balancer, seed=0)
            await link.try_weights((other, *UPDATE), CanaryOptions(weights=(0.5,)), 60)
            assert link.running and link.canary.state == RUNNING
            next(replica for replica in balancer.replicas if replica.on_trial).link.kill()
            while link.canary.state == RUNNING:
                assert await ask(link) in (before, after)
                await asyncio.sleep(0.02)
            assert link.canary.state == TAKEN_BACK and "has ended" in link.canary.why
            return before, after

    before, after = asyncio.run(run())
    assert before != after


def test_trials_of_weights_over_http(executable_cache, other, tmp_path):
    import httpx

    keys = tmp_path / "keys"
    keys.write_text("admin")
    port = free_port()
    options = ("--replicas", "2", "--admin-port", str(port), "--admin-keys", str(keys))
    server = Live(*SIZES, *options)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/admin", timeout=60,
                          headers={"Authorization": "Bearer admin"}) as admin:
            while len(server.stats()["engine"]["engines"]) < 2:
                time.sleep(0.1)
            for wrong in ({}, {"source": other, "adapter": "a"}, {"source": other, "weights": [0.6]}, {"source": "no"}):
                assert admin.post("/canary", json=wrong).status_code in (400, 404), wrong
            assert admin.get("/canary").json() == {"state": "none"}
            before = server.post("/v1/completions", {"model": "bundled", "prompt": "hello", "temperature": 0}).json()

            begun = admin.post("/canary", json={"source": other}).json()
            assert begun["source"] == other and begun["weight"] == 0.25 and begun["state"] == RUNNING
            assert admin.post("/canary", json={"source": other}).status_code == 409
            assert admin.post("/weights", json={"source": other, "wait": True}).status_code == 400
            _, found = until(admin, TAKEN_BACK, server)
            assert "otherwise" in found["why"] and found["requests"] <= 80
            asked(server, 12)

            same = {"source": str(SHIPPED["bundled"]), "weights": [0.25, 0.5], "requests": 5}
            for _ in range(200):
                begun = admin.post("/canary", json=same)
                if begun.status_code != 409:  # the last one's engine goes back to the weights before
                    break
                time.sleep(0.05)
            assert begun.status_code == 200
            until(admin, PROMOTED, server, 200)
            after = server.post("/v1/completions", {"model": "bundled", "prompt": "hello", "temperature": 0}).json()
            assert after["choices"][0]["text"] == before["choices"][0]["text"]
            asked(server, 12)
            assert admin.delete("/canary").json()["state"] == PROMOTED
            assert admin.get("/weights").json()["version"] > 0  # every engine has had an update
            assert admin.post("/weights/rollback").status_code == 200
    finally:
        server.output()
